"""Model: names on the hub, base and codec, LoRA on the base, checkpoints, resume, adapters, merging.

python lora.py merge --base_ckpt bosonai/higgs-tts-2-3b-base --adapter out/checkpoint-100 --output_dir merged
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import huggingface_hub
import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import AutoTokenizer, PretrainedConfig, utils

from dataset import UserError, gather, raise_if_any, user_error

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns that the DataLoader's workers are forks
BASE, CODEC = "bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-audio-v2-tokenizer"
# The last revisions in the format that boson_multimodal reads; the base has had a second name since June 2026
REVISIONS = {
    BASE: "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-tts-2-3b-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    CODEC: "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
HUB = {  # of a flag: its repository, the model_type in config.json, files to download
    "--base_ckpt": (BASE, "higgs_audio", ["*.json", "*.safetensors", "*.txt", "LICENSE*"]),
    "--audio_tokenizer": (CODEC, None, ["config.json", "model.pth"]),
}
GET = {flag: f"hf download {name} --revision {REVISIONS[name]}" for flag, (name, *_) in HUB.items()}
HUBERT = "bosonai/hubert_base"  # the codec's class loads it, with trust_remote_code=True
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Matched against the whole name: a suffix like q_proj would reach the Whisper tower, too
TARGET_MODULES = r"layers\.\d+\.((self_attn|audio_attn)\.[qkvo]_proj|(mlp|audio_mlp)\.(gate|up|down)_proj)"


def download(flag: str, name: str) -> Path:
    """The folder `name`, or that of NAME or NAME@REVISION on the hub, downloaded. Raises UserError."""
    folder = Path(name)
    if not folder.is_dir():  # one rank of a node downloads, the others wait for it
        repository, _, revision = str(name).partition("@")
        revision = revision or REVISIONS.get(repository, "main")
        remedy = f"where there is a network: hf download {repository} --revision {revision}"
        with user_error(f"{flag} {name}: no such folder, nor to be had from the hub; {remedy}"):
            fetch = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision)
            check_format(flag, Path(fetch(allow_patterns=["config.json"])))  # before 11.5 GB of weights
            folder = Path(fetch(allow_patterns=HUB[flag][2]))
    check_format(flag, folder)
    if not any(folder.glob(HUB[flag][2][1])):
        raise UserError(f"{flag} {folder} has no {HUB[flag][2][1]}; the download is not whole: {GET[flag]}")
    return folder


def check_format(flag: str, folder: Path) -> None:
    """Raise UserError for another model, or another format, such as that of transformers' own port."""
    with user_error(f"{flag} {folder}: no config.json (an adapter is no model); {GET[flag]}"):
        settings = json.loads((folder / "config.json").read_text())
        seen = settings.get("model_type")
    if seen != HUB[flag][1] or settings.get("encode_whisper_embed"):
        raise UserError(
            f"{flag} {folder} has model_type {seen}, expected {HUB[flag][1]}, no Whisper; {GET[flag]}"
        )


def open_base(folder: Path) -> tuple[HiggsAudioConfig, AutoTokenizer]:
    """A base's config and text tokenizer. Raises UserError where they are not whole."""
    with user_error(f"--base_ckpt {folder}: config or tokenizer is not whole; {GET['--base_ckpt']}"):
        return HiggsAudioConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def load_codec(folder: Path, device):
    """The codec. Raises UserError where it cannot be loaded, would run code, or was never trained."""
    warnings.filterwarnings("ignore", message=".*weight_norm")  # of torch, once a rank
    with user_error(f"codec cannot be loaded with HuBERT; {GET['--audio_tokenizer']}; hf download {HUBERT}"):
        settings, _ = PretrainedConfig.get_config_dict(HUBERT)
        if code := settings.get("auto_map") or utils.find_adapter_config_file(HUBERT):
            raise UserError(f"{HUBERT}, revision {settings['_commit_hash']}, would run code: {code}")
        codec = load_higgs_audio_tokenizer(str(folder), device=str(device))
    if not all(buffer.all() for name, buffer in codec.named_buffers() if name.endswith("inited")):
        raise UserError(f"--audio_tokenizer {folder} has codebooks that were never trained")
    return codec


def fingerprint(files: list[Path]) -> str:
    """sha256 of the files' contents, together."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with user_error(f"{file} cannot be read"), open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def embed_audio_ids(model, audio_ids: torch.Tensor, embed=HiggsAudioModel._embed_audio_ids) -> torch.Tensor:
    """Upstream's embeddings (A, hidden) of audio_ids (num_codebooks, A), in the dtype of their table."""
    # Under CUDA's autocast upstream's sum is float32, which it cannot write into a tensor of a bfloat16 base
    return embed(model, audio_ids).to(model.audio_codebook_embeddings.weight.dtype)


HiggsAudioModel._embed_audio_ids = embed_audio_ids  # on the class: for training, comparison and the engine


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights and computation; the adapter's weights are float32."""
    is_bf16 = precision == "bf16" or (precision == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if is_bf16 else torch.float32


def load_base(folder: Path, dtype: torch.dtype | str, device) -> HiggsAudioModel:
    """The frozen base, loaded straight to `device`, not by way of the CPU. Raises UserError."""
    with user_error(f"--base_ckpt {folder}: its weights cannot be loaded; is it whole? {GET['--base_ckpt']}"):
        model, info = HiggsAudioModel.from_pretrained(
            folder, torch_dtype=dtype, device_map={"": device}, output_loading_info=True
        )
    if info["missing_keys"]:  # transformers would go on with random numbers
        raise UserError(f"--base_ckpt {folder} lacks the weights {sorted(info['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def attach_lora(base: HiggsAudioModel, r: int, alpha: int, dropout: float, seed: int) -> PeftModel:
    """`base` with float32 LoRA, drawn from `seed`, on attention and both FFNs. UserError: some are gone."""
    found = [name for name, _ in base.named_modules() if re.fullmatch(TARGET_MODULES, name)]
    expected = 7 * len(base.layers) + 3 * len(base.config.audio_dual_ffn_layers or [])
    if len(found) < expected:
        raise UserError(f"--base_ckpt has {len(found)} linear layers for LoRA, expected {expected}")
    torch.manual_seed(seed)
    # Without a task type: with one, PEFT would pass on `labels`, which upstream's forward does not take
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGET_MODULES)
    model = get_peft_model(base, config)
    for module in model.modules():
        if isinstance(module, LoraLayer):  # autocast casts the inputs; PEFT would keep a copy of each
            module.cast_input_dtype_enabled = False
    return model


def build_model(args, folder: Path, device) -> PeftModel:
    """The base in `folder` with LoRA on it, in training mode, as the flags say."""
    base = load_base(folder, base_dtype(args.precision, device), device)
    if args.gradient_checkpointing:
        for layer in base.layers:  # upstream ignores gradient_checkpointing_enable()
            layer.forward = functools.partial(recompute_in_backward, layer.forward, use_reentrant=False)
    model = attach_lora(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    config = model.peft_config["default"]
    config.base_model_name_or_path = args.base_ckpt
    config.revision = REVISIONS.get(args.base_ckpt)
    return model.train()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, the oldest first; one without a state is none."""
    files = output_dir.glob("checkpoint-*/trainer_state.pt")
    found = {file.parent.name[11:]: file.parent for file in files}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def open_output(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from; `wanted` is auto, a folder or None. Raises UserError: another run's."""
    with user_error(f"--output_dir {output_dir} cannot be written"):
        output_dir.mkdir(parents=True, exist_ok=True)
        found = list_checkpoints(output_dir)
    newest = found[-1] if found else None
    chosen = newest if wanted == "auto" else wanted and Path(wanted)
    if chosen and not (chosen / "trainer_state.pt").exists():
        raise UserError(f"--resume_from_checkpoint {chosen} is no checkpoint; the newest is {newest}")
    adapters = *output_dir.glob(ADAPTER_WEIGHTS), *output_dir.glob(f"checkpoint-*/{ADAPTER_WEIGHTS}")
    if (newest or adapters) and not (chosen and newest and newest.samefile(chosen)):
        raise UserError(f"{output_dir} holds a run: use another folder, or --resume_from_checkpoint auto")
    return chosen


def read_checkpoint(folder: Path | None, settings: dict) -> dict:
    """A checkpoint's state: step, settings, optimizer, adapter; without a folder, step 0.

    Raises UserError where it is damaged or has other `settings`, or where ranks read different ones.
    """
    state, changed = {"step": 0}, []
    if folder:
        with user_error(f"{folder} cannot be read; move it away, and auto takes the one before"):
            state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
            state["adapter"] = load_file(folder / ADAPTER_WEIGHTS)
            was = state["settings"]
            for key, value in settings.items():
                if was[key] != value:
                    changed.append(f"{key}: was {was[key]!s:.12}, is {value!s:.12}")
    raise_if_any(
        f"{folder} is of another run, or of another file: choose another --output_dir, or give what it had",
        changed,
    )
    starts = gather({"step": state["step"], **settings})
    others = [f"rank {rank}: {start}" for rank, start in enumerate(starts) if start != starts[0]]
    raise_if_any(f"is --output_dir one folder for all? rank 0 has {starts[0]}", others)
    return state


def restore(model: PeftModel, optimizer, state: dict) -> None:
    """Load a checkpoint's adapter and AdamW's moments, if any; the learning rate is the command line's."""
    if state["step"]:
        set_peft_model_state_dict(model, state["adapter"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})


def save_lora_adapters(model: PeftModel, folder: Path, args, settings: dict) -> None:
    """Write the adapter alone, as plain PEFT, and in args.json the run's flags and fingerprints."""
    with user_error(f"{folder} cannot be written; if the disk is full, make room, then resume"):
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "args.json").write_text(json.dumps(vars(args) | settings, default=str, indent=2))
    with contextlib.suppress(OSError):  # a mounted bucket has no modes
        shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)  # safetensors' own is 0600


def write_through(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        os.fsync(descriptor)  # some shares can sync no folder
    os.close(descriptor)


def save_checkpoint(model: PeftModel, optimizer, settings: dict, args, step: int) -> None:
    """Write checkpoint-<step> whole or not at all. Raises UserError."""
    unfinished, whole = args.output_dir / "unfinished", args.output_dir / f"checkpoint-{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    with user_error(f"{whole} cannot be written; if the disk is full, make room, then resume"):
        save_lora_adapters(model, unfinished, args, settings)
        moments = optimizer.state_dict()["state"]
        state = {"settings": settings, "step": step, "optimizer": moments}
        torch.save(state, unfinished / "trainer_state.pt")
        for path in (*unfinished.iterdir(), unfinished):  # all on the disk before the final name
            write_through(path)
        unfinished.rename(whole)
        write_through(args.output_dir)


def load_adapter(base: HiggsAudioModel, folder: str, base_fingerprint: str) -> tuple[PeftModel, dict]:
    """(`base` with the adapter in `folder` on it, its args.json). UserError: damaged, or another base's."""
    problem = f"--adapter {folder}: no LoRA adapter there, or a damaged one"
    with user_error(problem), warnings.catch_warnings():
        file = Path(folder, "args.json")
        args = json.loads(file.read_text()) if file.exists() else {}
        if args.get("base_fingerprint", base_fingerprint) != base_fingerprint:
            raise UserError(f"--adapter {folder} was trained on another base: {args.get('base_ckpt')}")
        if not all(tensor.isfinite().all() for tensor in load_file(Path(folder, ADAPTER_WEIGHTS)).values()):
            raise UserError(f"--adapter {folder} is not finite; take an earlier checkpoint")
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(base, folder).eval(), args


def merge(base_ckpt: str, adapter: str, output_dir: Path) -> None:
    """Write base and adapter as one checkpoint like the base's, whole or not at all. Raises UserError."""
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir} is there already; choose another")
    source = download("--base_ckpt", base_ckpt)
    base_fingerprint = fingerprint(source.glob("*.safetensors"))
    model, _ = load_adapter(load_base(source, "auto", "cpu"), adapter, base_fingerprint)
    model = model.merge_and_unload()
    model.config._name_or_path = ""  # not a folder of this machine
    with user_error(f"--output_dir {output_dir} cannot be written"):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix="unfinished_") as folder:
            merged = Path(folder) / "merged"
            model.save_pretrained(merged)
            for file in merged.glob("*.safetensors"):
                with contextlib.suppress(OSError):
                    shutil.copymode(merged / "config.json", file)  # safetensors' own is 0600
            for file in source.iterdir():  # tokenizer, licence and the like
                is_weights = file.name.endswith((".safetensors", ".bin", ".pth", ".index.json"))
                if file.is_file() and not is_weights and not (merged / file.name).exists():
                    shutil.copyfile(file, merged / file.name)
            merged.rename(output_dir)
    print(f"{output_dir}: base and adapter as one; load it as the base")


def main():
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
