"""What a run leaves in --output_dir: checkpoints, adapter and model card, metrics.jsonl, runs/, loss.png."""

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
from huggingface_hub import ModelCardData
from matplotlib import colormaps
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from dataset import PipelineError, blaming
from lora import fingerprint

CHECKPOINT = "adapter_config.json", "adapter_model.safetensors", "trainer_state.pt"
FRAME_RATE = 25  # the codec's, 1/s


def open_output(output_dir, wanted):
    """Claim the folder; find the checkpoint to resume from (`wanted`: auto, path, None)."""
    with blaming(f"--output_dir {output_dir} cannot be written, or another run is training into it"):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(output_dir / "lock", os.O_CREAT | os.O_RDWR)  # never closed: the kernel frees it when
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process ends, however that happens
    found, finished = checkpoints(output_dir), (output_dir / "adapter_model.safetensors").exists()
    if wanted == "auto" and (found or not finished):
        return found[-1] if found else None
    newest = wanted and (not found or found[-1].resolve() == Path(wanted).resolve())
    if finished or found and not newest:
        raise PipelineError(f"--output_dir {output_dir} already holds an adapter or checkpoints; choose "
                            "another or, from a checkpoint, go on with --resume_from_checkpoint auto")
    return wanted and Path(wanted)


def checkpoints(output_dir):
    """The checkpoint folders in `output_dir`, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def read_checkpoint(folder, run):
    """A checkpoint's state. Raises PipelineError where it is damaged, or another run's than `run`."""
    with blaming(f"{folder} is damaged, or no checkpoint of this trainer; remove it, and "
                 "--resume_from_checkpoint auto takes the one before"):
        if (folder / "checksum").read_text() != fingerprint(folder / name for name in CHECKPOINT):
            raise ValueError("its checksum differs")
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        before = dict(state["run"], step=state["step"], optimizer=state["optimizer"])
        state["adapter"] = load_file(folder / "adapter_model.safetensors")
    differing = [f"{key} was {before.get(key)}, is {run[key]}" for key in run if before.get(key) != run[key]]
    if differing:
        raise PipelineError(f"{folder} belongs to another run: " + "; ".join(differing))
    return state


def describe(args, entries, frames, run, total):
    """What the model card tells of a run before its first step: {row: text}, command, base on the hub."""
    ranks, all_ranks = (int(os.environ.get(name, 0)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = [f"--nnodes={all_ranks // ranks}"] if all_ranks > ranks else []
    hours = sum(frames.values()) / FRAME_RATE / 3600
    rows = {"base": f"`{args.base_ckpt}`",
            "data": f"`{args.train_manifest.name}`: {len(entries):,} entries, {len(frames):,} clips of "
                    f"{hours:,.2f} hours",
            "LoRA": f"r {args.lora_r}, alpha {args.lora_alpha}, dropout {args.lora_dropout}",
            "steps": f"{total:,}, of {run['samples_per_step']:,} samples; learning rate {args.lr}"}
    program = ["torchrun", *nodes, f"--nproc_per_node={ranks}"] if ranks else ["python"]
    return rows, shlex.join([*program, *sys.argv]), None if os.path.exists(args.base_ckpt) else args.base_ckpt


def write_card(folder, output_dir, card, step):
    """The adapter's README.md, over PEFT's empty one; the hub takes no base that is a folder."""
    rows, command, base = card
    rows, lines = rows | {"this adapter": f"step {step:,}"}, read_metrics(output_dir)
    for line in lines[:: max(len(lines) - 1, 1)]:  # the first and the last
        text, audio = np.array([line["text_loss"], line["audio_loss"]], dtype=float)  # null becomes NaN
        rows |= {f"loss at step {line['step']:,}": f"text {text:.3f}, audio {audio:.3f}"}
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    data = ModelCardData(library_name="peft", pipeline_tag="text-to-speech", tags=["lora"], base_model=base)
    (folder / "README.md").write_text(f"""---
{data.to_yaml()}
---
# LoRA adapter for Higgs Audio v2

With boson_multimodal and peft: `PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(base), adapter)`.

| | |
|---|---|
{table}

```bash
{command}
```

""", encoding="utf-8")


def save_checkpoint(output_dir, model, optimizer, run, card, keep, step):
    """Write checkpoint-<step> whole or not at all, then loss.png; remove all but the newest `keep`."""
    unfinished, whole = output_dir / "unfinished", output_dir / f"checkpoint-{step}"
    try:
        with blaming(f"{whole} cannot be written; those before it are whole: make room, and go on with "
                     "--resume_from_checkpoint auto"):
            model.save_pretrained(str(unfinished), save_embedding_layers=False)
            write_card(unfinished, output_dir, card, step)
            torch.save(dict(run=run, step=step, optimizer=optimizer.state_dict()["state"]),
                       unfinished / "trainer_state.pt")
            (unfinished / "checksum").write_text(fingerprint(unfinished / name for name in CHECKPOINT))
            os.sync()  # all of it on the disk before it has its name
            unfinished.rename(whole)
            for folder in checkpoints(output_dir)[:-keep]:
                shutil.rmtree(folder)
        with blaming(f"--output_dir {output_dir} cannot be written; {whole} is whole"):
            draw(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(checkpoint, output_dir):
    """Copy a checkpoint's adapter to where the final one belongs, each file whole or not at all."""
    with blaming(f"the adapter of {checkpoint} cannot be copied to --output_dir; make room and start again"):
        for name in (*CHECKPOINT[:2], "README.md"):
            shutil.copy(checkpoint / name, output_dir / f"{name}.unfinished")
            os.replace(output_dir / f"{name}.unfinished", output_dir / name)


def open_board(output_dir, step):
    """TensorBoard's writer; and takes out of metrics.jsonl what a killed run had written after `step`."""
    file, kept = output_dir / "metrics.jsonl", output_dir / "metrics.unfinished"
    with blaming(f"--output_dir {output_dir} cannot be written"):
        lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
        steps = [re.match(r'{"step": (\d+), .*}\n', line) for line in lines]  # None of a torn line
        kept.write_text("".join(found[0] for found in steps if found and int(found[1]) <= step))
        kept.replace(file)
        draw(output_dir)
        return SummaryWriter(output_dir / "runs", purge_step=step + 1)


def peak_memory():
    """Bytes at the peak: of the GPU's allocator, without a GPU of this process."""
    return torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024


def report(output_dir, board, losses, seen, waited, took, metrics):
    """Add a line to metrics.jsonl and points to TensorBoard.

    losses: the text's, then each codebook's. seen: samples, positions and positions with padding since the
    last line; that took so many seconds, of which the rank waited for data.
    """
    audio_loss, (samples, positions, padded) = sum(losses[1:]) / len(losses[1:]), seen
    metrics |= {"loss": losses[0] + audio_loss, "text_loss": losses[0], "audio_loss": audio_loss,
                "samples_per_s": samples / took, "tokens_per_s": positions / took,
                "padding": 1 - positions / padded, "data_wait": waited / took,
                "max_memory_gb": peak_memory() / 1e9}
    curves = metrics | {f"codebook_{k}": loss for k, loss in enumerate(losses[1:])}
    line = metrics | {"audio_loss_per_codebook": losses[1:]}
    with blaming(f"--output_dir {output_dir} cannot be written"):
        with open(output_dir / "metrics.jsonl", "a") as stream:
            stream.write(re.sub("-?(NaN|Infinity)", "null", json.dumps(line)) + "\n")  # JSON has neither
        for name in curves.keys() - {"step"}:
            board.add_scalar(name, curves[name], metrics["step"])
        board.flush()


def read_metrics(output_dir):
    """The lines of metrics.jsonl as dicts; none where there is no such file."""
    file = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def draw(output_dir):
    """loss.png: losses, each codebook's, learning rate and gradient norm over the steps of metrics.jsonl."""
    if not (lines := read_metrics(output_dir)):
        return
    figure = Figure(figsize=(12, 8), layout="constrained")
    (losses, codebooks), (rates, norms) = figure.subplots(2, 2, sharex=True)

    def plot(axis, values, **style):
        steps, values = [line["step"] for line in lines], np.array(values, dtype=float)  # null becomes NaN
        axis.plot(steps, values, marker="." if len(lines) < 50 else None, **style)

    for name, color in (("text_loss", "tab:orange"), ("audio_loss", "tab:blue")):
        values = np.array([line[name] for line in lines], dtype=float)
        plot(losses, values, color=color, label=f"{name.replace('_', ' ')}, at last {values[-1]:.3f}")
    count = len(lines[0]["audio_loss_per_codebook"])
    for k in range(count):
        plot(codebooks, [line["audio_loss_per_codebook"][k] for line in lines], label=f"codebook {k}",
             color=colormaps["viridis"](k / count))
    codebooks.axhline(math.log(1026), color="gray", linestyle=":", label="by chance: ln 1026")
    plot(rates, [line["lr"] for line in lines])
    plot(norms, [line["grad_norm"] for line in lines])
    norms.set_yscale("log")
    for axis, title in ((losses, "loss"), (codebooks, "audio loss of each codebook"),
                        (rates, "learning rate"), (norms, "gradient norm, before clipping")):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in (losses, codebooks):
        axis.set_ylim(bottom=0)
        axis.legend()
    for axis in (rates, norms):
        axis.set_xlabel("step")
    figure.savefig(output_dir / "loss.png", dpi=100)
