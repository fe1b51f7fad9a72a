"""Model: hub names, base, LoRA on the DualFFN, optimizer; checkpoints, metrics, merge.
python lora.py merge --base_ckpt bosonai/higgs-audio-v2-generation-3B-base --adapter out --output_dir new
"""

import argparse
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
from pathlib import Path

import huggingface_hub
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoTokenizer, PretrainedConfig, get_cosine_schedule_with_warmup

from dataset import PipelineError, add_up, blaming, refuse

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns of forks, the workers
# The hub's main is transformers' own format since April 2026; boson_multimodal reads these
ORIGINALS = {
    "bosonai/higgs-audio-v2-generation-3B-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-audio-v2-tokenizer": "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
BASE_FILES, CODEC_FILES = ["*.json", "*.safetensors", "*.txt", "LICENSE*"], ["config.json", "model.pth"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
# Matched against the whole name: suffixes like q_proj would reach audio_tower, too
TARGET_MODULES = r"layers\.\d+\.((self_attn|audio_attn)\.[qkvo]_proj|(mlp|audio_mlp)\.(gate|up|down)_proj)"

embed_audio_ids = HiggsAudioModel._embed_audio_ids


def embed_audio_ids_in_base_dtype(model, audio_ids):
    """Upstream's audio embeddings (A, hidden), in the dtype of their table.

    CUDA's autocast sums in float32, the CPU's does not. Upstream writes the sum into a tensor of the
    base's dtype in place, which raises where that is bfloat16.
    """
    return embed_audio_ids(model, audio_ids).to(model.audio_codebook_embeddings.weight.dtype)


HiggsAudioModel._embed_audio_ids = embed_audio_ids_in_base_dtype  # training, comparison and engine share it


def split_name(name):
    """(repository, revision) of NAME or NAME@REVISION; (folder, None) of a folder."""
    if os.path.isdir(name):
        return str(name), None
    repository, _, revision = str(name).partition("@")
    return repository, revision or ORIGINALS.get(repository, "main")


def fetch(flag, name, needed):
    """The folder that `name` means, downloaded where it is the hub's. PipelineError."""
    repository, revision = split_name(name)
    folder = repository
    if revision:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            huggingface_hub.utils.disable_progress_bars()  # its locks let one of a node download, others wait
        with blaming(
            f"{flag} {name}: no such folder, neither cached nor to be had from the hub; where there "
            f"is a network: huggingface-cli download {repository} --revision {revision}"
        ):
            folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=needed)
    if not os.path.exists(f"{folder}/config.json"):
        return Path(folder)  # an adapter's
    with blaming(f"{flag} {name}: its config.json cannot be read"):
        model_type = str(PretrainedConfig.get_config_dict(folder)[0].get("model_type"))
    if model_type.startswith("higgs_audio_v2"):
        base, codec = (f"{original}@{revision}" for original, revision in ORIGINALS.items())
        raise PipelineError(
            f"{flag} {name} is in transformers' own format ({model_type}), the hub's main "
            "since April 2026; boson_multimodal cannot read it. The last original is "
            f"{codec if 'tokenizer' in model_type else base}"
        )
    return Path(folder)


def fingerprint(*files):
    """sha256 of the files' contents."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def open_base(folder):
    """A base checkpoint's (config, text tokenizer). PipelineError where there is none."""
    with blaming(f"--base_ckpt {folder}: no Higgs Audio checkpoint there"):
        settings, _ = PretrainedConfig.get_config_dict(folder)
        if settings.get("model_type") != "higgs_audio" or settings.get("encode_whisper_embed"):
            raise PipelineError(f"{folder} is {settings.get('model_type')}, not higgs_audio without Whisper")
        return HiggsAudioConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def load_base(folder, dtype, device):
    """The frozen HiggsAudioModel, straight to `device`, never whole in CPU memory."""
    with blaming(f"--base_ckpt {folder}: its weights cannot be loaded"):
        model, info = HiggsAudioModel.from_pretrained(
            folder, torch_dtype=dtype, device_map={"": device}, output_loading_info=True
        )
    if info["missing_keys"]:  # transformers would go on with random numbers
        raise PipelineError(f"--base_ckpt {folder} lacks the weights {sorted(info['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def base_dtype(precision, device):
    """What the frozen base is held and computed in; the adapter is float32 in both."""
    bf16 = precision == "bf16" or (precision == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def take_text_head(base):
    """Take the head out of the forward: it would apply 128,256 columns everywhere."""
    text_head = base.audio_decoder_proj.text_lm_head
    base.audio_decoder_proj.text_lm_head = torch.nn.Identity()
    return text_head


def attach(base, r, alpha, dropout, seed):
    """Wrap `base` in LoRA, drawn from `seed`, in float32; 280 modules as released."""
    torch.manual_seed(seed)
    return get_peft_model(
        base,
        LoraConfig(  # no task type: PEFT would pass `labels` on
            r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGET_MODULES
        ),
    )


def build_model(args, folder, device):
    """The base in `folder` with LoRA, ready to train: (model, its text head apart)."""
    base = load_base(folder, base_dtype(args.precision, device), device)
    text_head = take_text_head(base)
    model = attach(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = split_name(args.base_ckpt)
    for module in model.modules():
        if isinstance(module, LoraLayer):  # autocast casts for lora_A: no copies
            module.cast_input_dtype_enabled = False
    if args.gradient_checkpointing:
        for layer in base.layers:  # they ignore transformers' own switch
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model.train(), text_head


def fit_max_tokens(args, config, free):
    """Positions that fit 3/4 of `free` bytes, by `tests/manual/benchmark.py --count`."""
    without = 72 if args.lora_dropout else 46  # bytes a position, layer and hidden column
    kept = 5 if args.gradient_checkpointing else without
    position = kept * config.text_config.num_hidden_layers * config.text_config.hidden_size
    return 2 ** int(math.log2(min(0.75 * free / position, 16_384)))


def build_optimizer(model, args, total, state):
    """(parameters, AdamW, cosine schedule) at `state`, with its adapter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "initial_lr": args.lr}],
        lr=args.lr,
        weight_decay=args.weight_decay,
        fused=True,
    )
    if state["step"]:  # learning rate and weight decay are the command line's
        set_peft_model_state_dict(model, state["adapter"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    schedule = get_cosine_schedule_with_warmup(
        optimizer, int(args.warmup_ratio * total), total, last_epoch=state["step"] - 1
    )
    return parameters, optimizer, schedule


def update(optimizer, schedule, parameters, max_grad_norm):
    """Clip and step, if the gradient is finite. Returns its norm, still on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    optimizer.found_inf = (~norm.isfinite()).float()  # GradScaler's, read on the device
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm


def open_output(output_dir, wanted):
    """Claim the folder. The checkpoint to resume from, by `wanted`: auto, path, None."""
    with blaming(f"--output_dir {output_dir} cannot be written, or another run is in it"):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(output_dir / "lock", os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    found, finished = checkpoints(output_dir), (output_dir / ADAPTER_FILES[1]).exists()
    if wanted == "auto" and found:
        return found[-1]
    newest = wanted and found and found[-1].resolve() == Path(wanted).resolve()
    if finished or (found and not newest):
        raise PipelineError(
            f"--output_dir {output_dir} already holds an adapter or checkpoints; "
            "choose another, or go on with --resume_from_checkpoint auto"
        )
    return Path(wanted) if wanted and wanted != "auto" else None


def checkpoints(output_dir):
    """The checkpoint folders in `output_dir`, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def read_checkpoint(folder, run):
    """State of a checkpoint, or of the start. PipelineError: damaged, another `run`'s."""
    if folder is None:
        return {"step": 0, "history": []}
    with blaming(
        f"{folder} is damaged, or no checkpoint of this trainer; remove it, and "
        "--resume_from_checkpoint auto takes the one before"
    ):
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        before = {**state["run"], **{key: state[key] for key in ("step", "optimizer", "history")}}
        state["adapter"] = load_file(folder / ADAPTER_FILES[1])
    refuse(
        f"{folder} belongs to another run",
        [(key, f"was {before.get(key)}, is {run[key]}") for key in run if before.get(key) != run[key]],
    )
    return state


def save_checkpoint(model, optimizer, run, args, history, step):
    """Write checkpoint-<step> whole or not at all; keep the newest --save_total_limit."""
    unfinished, whole = args.output_dir / "unfinished", args.output_dir / f"checkpoint-{step}"
    try:
        with blaming(
            f"{whole} cannot be written; those before it are whole: make room, and go on "
            "with --resume_from_checkpoint auto"
        ):
            model.save_pretrained(str(unfinished), save_embedding_layers=False)
            make_readable(unfinished)
            (unfinished / "args.json").write_text(json.dumps(vars(args), default=str, indent=2))
            torch.save(
                {"run": run, "step": step, "optimizer": optimizer.state_dict()["state"], "history": history},
                unfinished / "trainer_state.pt",
            )
            os.sync()  # all of it on the disk before it has its name
            unfinished.rename(whole)
            for folder in checkpoints(args.output_dir)[: -args.save_total_limit]:
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_readable(folder):
    """Give weights the umask's mode, as other files have: safetensors makes them 0600."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(next(folder.glob("*config.json")), file)


def publish(folder, output_dir):
    """Copy a checkpoint's adapter to the final one's place, each file whole or not."""
    with blaming(f"the adapter of {folder} cannot be copied; make room, start again"):
        for name in (*ADAPTER_FILES, "README.md", "args.json"):
            shutil.copy(folder / name, output_dir / f"{name}.unfinished")
            os.replace(output_dir / f"{name}.unfinished", output_dir / name)


def open_metrics(output_dir, history, step):
    """TensorBoard's writer; metrics.jsonl becomes `history`: later steps are done again."""
    with blaming(f"--output_dir {output_dir} cannot be written"):
        (output_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
        return SummaryWriter(output_dir / "runs", purge_step=step + 1)


def peak_memory():
    """Bytes at the peak: of the GPU's allocator, without a GPU of this process."""
    status = Path("/proc/self/status").read_text()
    return torch.cuda.max_memory_allocated() or int(status.partition("VmHWM:")[2].split()[0]) * 1024


def summarize(losses, interval, seconds, waited):
    """`losses` (of the text, then each codebook); speed and memory of an interval."""
    text_loss, *codebooks = losses
    audio_loss = sum(codebooks) / len(codebooks)
    _, samples, positions, padded = add_up(interval)
    return {
        "loss": text_loss + audio_loss,
        "text_loss": text_loss,
        "audio_loss": audio_loss,
        "audio_loss_per_codebook": codebooks,
        "samples_per_s": samples / seconds,
        "tokens_per_s": positions / seconds,
        "padding": 1 - positions / padded,
        "data_wait": waited / seconds,
        "max_memory_gb": peak_memory() / 1e9,
    }


def log_metrics(output_dir, board, history, metrics):
    """Add `metrics`, null where not finite, to `history`, metrics.jsonl, TensorBoard."""
    text = re.sub("-?(NaN|Infinity)", "null", json.dumps(metrics))
    history.append(json.loads(text))
    with blaming(f"--output_dir {output_dir} cannot be written"):
        with open(output_dir / "metrics.jsonl", "a") as stream:
            stream.write(text + "\n")
        for name in metrics.keys() - {"step", "audio_loss_per_codebook"}:
            board.add_scalar(name, metrics[name], metrics["step"])
        for k, loss in enumerate(metrics["audio_loss_per_codebook"]):
            board.add_scalar(f"codebook_{k}", loss, metrics["step"])
        board.flush()


def load_adapter(base, name):
    """`base` with adapter `name` on it. PipelineError: damaged, or another base's."""
    folder = fetch("--adapter", name, ADAPTER_FILES)
    with blaming(f"--adapter {name}: no LoRA adapter there, or a damaged one"):
        tensors = load_file(folder / ADAPTER_FILES[1])
        model = PeftModel(base, LoraConfig.from_pretrained(folder)).eval()
    found = {key: tensor.shape for key, tensor in tensors.items()}
    expected = {key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()}
    refuse(
        f"--adapter {name} does not fit the base",
        [
            (key, f"is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}")
            for key in sorted(found.keys() | expected)
            if found.get(key) != expected.get(key)
        ],
    )
    refuse(
        f"--adapter {name} holds numbers that are not finite",
        [(key, "look at its training") for key, tensor in tensors.items() if not tensor.isfinite().all()],
    )
    set_peft_model_state_dict(model, tensors)
    return model


def merge(base_ckpt, adapter, output_dir):
    """Write base and adapter as one checkpoint like the base's, whole or not at all."""
    if output_dir.exists():
        raise PipelineError(f"--output_dir {output_dir} is there already; choose another")
    source = fetch("--base_ckpt", base_ckpt, BASE_FILES)
    model = load_adapter(load_base(source, "auto", "cpu"), adapter).merge_and_unload()
    model.config._name_or_path = "" if os.path.isdir(base_ckpt) else split_name(base_ckpt)[0]
    parent = output_dir.absolute().parent
    with blaming(f"--output_dir {output_dir} cannot be written"):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="unfinished_") as folder:
            merged = Path(folder) / "merged"
            model.save_pretrained(merged)
            make_readable(merged)
            for file in source.iterdir():  # tokenizer, licence and the like
                weights = file.name.endswith((".safetensors", ".bin", ".pth", ".index.json"))
                if file.is_file() and not weights and not (merged / file.name).exists():
                    shutil.copyfile(file, merged / file.name)
            merged.rename(output_dir)
    print(f"{output_dir}: base and adapter as one; load it as the base")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_subparsers(required=True, metavar="merge").add_parser("merge").add_argument
    add("--base_ckpt", required=True, help="the base that the adapter was trained on")
    add("--adapter", required=True, help="trainer.py's --output_dir, or a checkpoint")
    add("--output_dir", type=Path, required=True, help="a new folder for the whole model")
    try:
        merge(**vars(parser.parse_args()))
    except PipelineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
