"""Model: names on the hub, the base, LoRA on it, adapters and checkpoints on the disk, merging.

python lora.py merge --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \\
    --adapter out/checkpoint-100 --output_dir merged
"""

import argparse
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import huggingface_hub
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import AutoTokenizer, PretrainedConfig

from dataset import UserError, raise_if_any, user_error

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns that the DataLoader's workers are forks
BASE, CODEC = "bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-audio-v2-tokenizer"
# The last revisions in the format that boson_multimodal reads; the base has had a second name since June 2026
REVISIONS = {
    BASE: "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-tts-2-3b-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    CODEC: "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
BASE_FILES = ["*.json", "*.safetensors", "*.txt", "LICENSE*"]
CODEC_FILES = ["config.json", "model.pth"]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Matched against the whole name: a suffix like q_proj would reach the Whisper tower, too
TARGET_MODULES = r"layers\.\d+\.((self_attn|audio_attn)\.[qkvo]_proj|(mlp|audio_mlp)\.(gate|up|down)_proj)"


def split_name(name: str | Path) -> tuple[str, str | None]:
    """(repository, revision) of NAME or NAME@REVISION on the hub; (folder, None) of a local folder."""
    if os.path.isdir(name):
        return str(name), None
    repository, _, revision = str(name).partition("@")
    return repository, revision or REVISIONS.get(repository, "main")


def download(flag: str, name: str | Path, patterns: list[str]) -> Path:
    """The folder that `name` means, downloaded where it is the hub's. Raises UserError."""
    repository, revision = split_name(name)
    if revision is None:
        check_format(flag, Path(repository))
        return Path(repository)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        huggingface_hub.utils.disable_progress_bars()  # one rank of a node downloads, the others wait for it
    with user_error(
        f"{flag} {name}: no such folder, neither cached nor to be had from the hub; where there is a "
        f"network: huggingface-cli download {repository} --revision {revision}"
    ):
        fetch = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision)
        check_format(flag, Path(fetch(allow_patterns=["config.json"])))  # before 11.5 GB of weights
        return Path(fetch(allow_patterns=patterns))


def check_format(flag: str, folder: Path) -> None:
    """Raise UserError for a checkpoint in the format of transformers' own port of the model."""
    if not (folder / "config.json").exists():
        return  # an adapter
    with user_error(f"{flag} {folder}: its config.json cannot be read"):
        model_type = str(PretrainedConfig.get_config_dict(folder)[0].get("model_type"))
    if model_type.startswith("higgs_audio_v2"):
        original = CODEC if "tokenizer" in model_type else BASE
        raise UserError(
            f"{flag} {folder} is in transformers' own format ({model_type}), which the hub's main has "
            "had since April 2026 and boson_multimodal cannot read. The last original is "
            f"{original}@{REVISIONS[original]}"
        )


def open_base(folder: Path) -> tuple[HiggsAudioConfig, AutoTokenizer]:
    """A base's config and text tokenizer. Raises UserError where `folder` holds no Higgs Audio model."""
    with user_error(f"--base_ckpt {folder}: no Higgs Audio checkpoint there"):
        settings, _ = PretrainedConfig.get_config_dict(folder)
        if settings.get("model_type") != "higgs_audio" or settings.get("encode_whisper_embed"):
            seen = settings.get("model_type", "no model")
            raise UserError(f"--base_ckpt {folder} is {seen}, not higgs_audio without Whisper")
        return HiggsAudioConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def base_fingerprint(folder: Path) -> str:
    """sha256 of each weight's first row: it tells two bases apart, and all 11.5 GB would take minutes."""
    rows = {}
    with user_error(f"--base_ckpt {folder}: its weights cannot be read"):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    row = weights.get_slice(name)[:1].contiguous().view(torch.uint8)
                    rows[name] = name.encode() + row.numpy().tobytes()
    if not rows:
        raise UserError(f"--base_ckpt {folder} has no *.safetensors")
    return hashlib.sha256(b"".join(rows[name] for name in sorted(rows))).hexdigest()


original_embed_audio_ids = HiggsAudioModel._embed_audio_ids


def embed_audio_ids(model, audio_ids: torch.Tensor) -> torch.Tensor:
    """Upstream's embeddings (A, hidden) of audio_ids (num_codebooks, A), in the dtype of their table.

    Under CUDA's autocast upstream's sum is float32; upstream then writes it in place into a tensor of the
    base's dtype, which raises for bfloat16.
    """
    return original_embed_audio_ids(model, audio_ids).to(model.audio_codebook_embeddings.weight.dtype)


HiggsAudioModel._embed_audio_ids = embed_audio_ids  # on the class: for training, comparison and the engine


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights and computation; the adapter's weights are float32."""
    is_bf16 = precision == "bf16" or (precision == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if is_bf16 else torch.float32


def load_base(folder: Path, dtype: torch.dtype | str, device) -> HiggsAudioModel:
    """The frozen base, loaded straight to `device`, not by way of the CPU. Raises UserError."""
    with user_error(f"--base_ckpt {folder}: its weights cannot be loaded"):
        model, info = HiggsAudioModel.from_pretrained(
            folder, torch_dtype=dtype, device_map={"": device}, output_loading_info=True
        )
    if info["missing_keys"]:  # transformers would go on with random numbers
        raise UserError(f"--base_ckpt {folder} lacks the weights {sorted(info['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def attach_lora(base: HiggsAudioModel, r: int, alpha: int, dropout: float, seed: int) -> PeftModel:
    """Wrap `base` in a float32 LoRA adapter, drawn from `seed`: attention and both FFNs of each layer.

    Raises UserError for a base that lacks some of these linear layers (280 as released).
    """
    found = sum(bool(re.fullmatch(TARGET_MODULES, name)) for name, _ in base.named_modules())
    expected = 7 * len(base.layers) + 3 * len(base.config.audio_dual_ffn_layers or [])
    if found < expected:
        raise UserError(f"--base_ckpt has {found} linear layers for LoRA, expected {expected}")
    torch.manual_seed(seed)
    # Without a task type: with one, PEFT would pass on `labels`, which upstream's forward does not take
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGET_MODULES)
    return get_peft_model(base, config)


def build_model(args, folder: Path, device) -> PeftModel:
    """The base in `folder` with LoRA on it, in training mode, as the flags say."""
    base = load_base(folder, base_dtype(args.precision, device), device)
    if args.gradient_checkpointing:
        for layer in base.layers:  # upstream ignores gradient_checkpointing_enable()
            layer.forward = functools.partial(recompute_in_backward, layer.forward, use_reentrant=False)
    model = attach_lora(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = split_name(args.base_ckpt)
    for module in model.modules():  # autocast casts inputs: PEFT's own cast would keep copies of them
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model.train()


def fit_max_tokens(args, model, free_bytes: int) -> int:
    """Positions whose activations fill 3/4 of the memory, a power of two of at most 16,384.

    The constants are bytes a position, layer and hidden unit, counted with tests/support's stand-in for CUDA.
    """
    config = model.config.text_config
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layer = 63.3 if args.lora_dropout else 46.7
    kept = layer * config.num_hidden_layers
    if args.gradient_checkpointing:
        kept = layer + 2 * config.num_hidden_layers
    free_bytes -= 12 * trainable  # gradients and AdamW's two moments, float32
    positions = 0.75 * free_bytes / ((kept + 7.7) * config.hidden_size)
    return 2 ** int(math.log2(max(1, min(positions, 16_384))))


def open_output(output_dir: Path, wanted: str | None) -> Path | None:
    """Lock the folder for this run; returns the checkpoint to resume from. wanted: auto, a folder or None.

    Raises UserError where the folder cannot be written, is in use, or holds another run than `wanted`.
    """
    with user_error(f"--output_dir {output_dir} cannot be written, or another run is in it"):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(output_dir / "lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"{output_dir} has no locks: make sure that no other run is in it", stacklevel=2)
    found = list_checkpoints(output_dir)
    newest = found[-1] if found else None
    chosen = newest
    if wanted != "auto":
        chosen = Path(wanted) if wanted else None
    if chosen and not (chosen / "trainer_state.pt").exists():
        raise UserError(f"--resume_from_checkpoint {chosen} is no checkpoint; there are {[*map(str, found)]}")
    holds_run = found or (output_dir / ADAPTER_WEIGHTS).exists()
    if holds_run and not (chosen and newest and chosen.samefile(newest)):
        raise UserError(f"--output_dir {output_dir} holds a run: choose another, or resume from its newest")
    return chosen


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, the oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def read_checkpoint(folder: Path | None, run: dict) -> dict:
    """A checkpoint's state: step, run, optimizer, adapter. Without a folder, only step 0.

    `run` has the settings that a resume must keep. Raises UserError: damaged, or another run's.
    """
    if folder is None:
        return {"step": 0}
    with user_error(f"{folder} cannot be read; move it away, and auto takes the one before"):
        saved = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        state = {key: saved[key] for key in ("run", "step", "optimizer")}
        state["adapter"] = load_file(folder / ADAPTER_WEIGHTS)
    if not all(tensor.isfinite().all() for tensor in state["adapter"].values()):
        raise UserError(
            f"{folder} has an adapter that is not finite; move it away, go on with the one before"
        )
    was = state["run"]
    changed = [(key, f"was {was.get(key)}, is {run[key]}") for key in run if was.get(key) != run[key]]
    raise_if_any(f"{folder} belongs to another run", changed)
    return state


def save_lora_adapters(model: PeftModel, folder: Path, args: dict) -> None:
    """Write the adapter alone, as plain PEFT, and beside it the run's flags and its base in args.json."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)  # safetensors' own is 0600
    (folder / "args.json").write_text(json.dumps(args, default=str, indent=2))


def write_through(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(model: PeftModel, optimizer, run: dict, args, step: int) -> None:
    """Write checkpoint-<step> whole or not at all; keep the newest --save_total_limit. Raises UserError."""
    unfinished, whole = args.output_dir / "unfinished", args.output_dir / f"checkpoint-{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with user_error(f"{whole} cannot be written; those before it are whole: make room, then resume"):
            save_lora_adapters(model, unfinished, {**vars(args), "base_fingerprint": run["base_ckpt"]})
            state = {"run": run, "step": step, "optimizer": optimizer.state_dict()["state"]}
            torch.save(state, unfinished / "trainer_state.pt")
            for path in (*unfinished.iterdir(), unfinished):  # all on the disk before the final name
                write_through(path)
            unfinished.rename(whole)
            write_through(args.output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for folder in list_checkpoints(args.output_dir)[: -args.save_total_limit]:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, output_dir: Path) -> None:
    """Copy a checkpoint's adapter to output_dir; the weights, copied last, mark it as finished."""
    with user_error(f"the adapter of {folder} cannot be copied; make room, then resume"):
        for name in ("README.md", "args.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy(folder / name, output_dir / f"{name}.unfinished")
            os.replace(output_dir / f"{name}.unfinished", output_dir / name)


def load_adapter(base: HiggsAudioModel, name: str, base_id: str) -> PeftModel:
    """`base` with the adapter `name` on it. Raises UserError where it is damaged or another base's."""
    folder = download("--adapter", name, [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "args.json"])
    with user_error(f"--adapter {name}: no LoRA adapter there, or a damaged one"):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        model = PeftModel(base, LoraConfig.from_pretrained(folder)).eval()
        file = folder / "args.json"
        args = json.loads(file.read_text()) if file.exists() else {}
    if "base_fingerprint" not in args:
        warnings.warn(f"--adapter {name} does not say which base it was trained on", stacklevel=2)
    elif args["base_fingerprint"] != base_id:
        raise UserError(f"--adapter {name} was trained on another base: {args.get('base_ckpt')}")
    expected = get_peft_model_state_dict(model)
    problems = [(key, "is missing") for key in expected.keys() - tensors.keys()]
    for key, tensor in tensors.items():
        if key not in expected or tensor.shape != expected[key].shape:
            shape = tuple(expected[key].shape) if key in expected else "none"
            problems.append((key, f"has shape {tuple(tensor.shape)}, expected {shape}"))
        elif not tensor.isfinite().all():
            problems.append((key, "holds numbers that are not finite; look at its training"))
    raise_if_any(f"--adapter {name} does not fit the base", problems)
    set_peft_model_state_dict(model, tensors)
    return model


def merge(base_ckpt: str, adapter: str, output_dir: Path) -> None:
    """Write base and adapter as one checkpoint like the base's, whole or not at all. Raises UserError."""
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir} is there already; choose another")
    source = download("--base_ckpt", base_ckpt, BASE_FILES)
    open_base(source)
    base_id = base_fingerprint(source)
    model = load_adapter(load_base(source, "auto", "cpu"), adapter, base_id).merge_and_unload()
    model.config._name_or_path = "" if os.path.isdir(base_ckpt) else split_name(base_ckpt)[0]
    parent = output_dir.absolute().parent
    with user_error(f"--output_dir {output_dir} cannot be written"):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="unfinished_") as folder:
            merged = Path(folder) / "merged"
            model.save_pretrained(merged)
            for file in merged.glob("*.safetensors"):
                shutil.copymode(merged / "config.json", file)  # safetensors' own is 0600
            for file in source.iterdir():  # tokenizer, licence and the like
                is_weights = file.name.endswith((".safetensors", ".bin", ".pth", ".index.json"))
                if file.is_file() and not is_weights and not (merged / file.name).exists():
                    shutil.copyfile(file, merged / file.name)
            merged.rename(output_dir)
    print(f"{output_dir}: base and adapter as one; load it as the base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["merge"], help="make one model of a base and an adapter")
    parser.add_argument("--base_ckpt", required=True, help="the base that the adapter was trained on")
    parser.add_argument("--adapter", required=True, help="trainer.py's --output_dir, or a checkpoint in it")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for the whole model")
    args = parser.parse_args()
    try:
        merge(args.base_ckpt, args.adapter, args.output_dir)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
