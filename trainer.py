"""Training: flags, ranks, the order of samples, losses, optimizer, metrics: torchrun ... trainer.py --help"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank ends with its torchrun, also while it imports what follows
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import dataset
import lora
from dataset import UserError, user_error

FLAGS = [  # (name, type, default, help)
    ("base_ckpt", str, lora.BASE, "the base: a folder, or NAME or NAME@REVISION on the hub"),
    ("audio_tokenizer", str, lora.CODEC, "the codec: a folder, or NAME or NAME@REVISION on the hub"),
    ("code_cache", Path, None, "folder of the encoded clips (None: code_cache beside the manifest)"),
    ("lora_r", int, 16, "rank of the LoRA matrices"),
    ("lora_alpha", int, 32, "the adapter's output is scaled by lora_alpha / lora_r"),
    ("lora_dropout", float, 0.05, "dropout of the adapter's input"),
    ("batch_size", int, 2, "a step has batch_size x grad_accum x ranks samples"),
    ("grad_accum", int, 8, "see batch_size; how many are computed at once, max_tokens says"),
    ("max_tokens", int, 8192, "positions of a micro-batch, padded; 8192 take 60 GB of a GPU, 1024 take 18"),
    ("lr", float, 2e-4, "highest learning rate of the cosine schedule; the first thing to lower"),
    ("warmup_ratio", float, 0.03, "share of the steps in which the learning rate rises from 0"),
    ("max_grad_norm", float, 1.0, "the gradient of a step is clipped to this norm"),
    ("epochs", int, 2, "how often each sample is trained"),
    ("max_steps", int, None, "number of optimizer steps (None: as many as --epochs makes)"),
    ("seed", int, 42, "of the order of samples, of LoRA's first weights and of dropout"),
    ("num_workers", int, dataset.NUM_WORKERS, "DataLoader workers a rank, by its cores"),
    ("logging_steps", int, 10, "steps between two lines of metrics"),
    ("save_steps", int, None, "steps between two checkpoints, of 0.5 GB each (None: at most ten in a run)"),
    ("resume_from_checkpoint", str, None, "a checkpoint's folder, or auto: output_dir's newest, if any"),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. A number that is too low ends the program with exit code 2."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--train_manifest", type=Path, required=True, help="ChatML: a JSON array, or JSONL")
    parser.add_argument("--output_dir", type=Path, required=True, help="of adapter, checkpoints, metrics")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of the base")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="saves memory, costs time")
    for name, kind, default, explanation in FLAGS:
        parser.add_argument(f"--{name}", type=kind, default=default, help=explanation)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        lowest = 0 if isinstance(value, float) or name in ("seed", "num_workers") else 1
        if type(value) in (int, float) and not value >= lowest:
            parser.error(f"--{name} is {value}; expected {lowest} or more")
    return args


def start() -> torch.device:
    """Join torchrun's ranks. Returns this rank's GPU, or the CPU where there is none. Raises UserError."""
    device, hidden = torch.device("cpu"), os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available():
        # cuDNN attention makes a plan for each new length, which takes about a second each time
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Micro-batches differ in shape, which would fragment the memory in segments of fixed size
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif torch.version.cuda and not hidden and os.path.exists("/dev/nvidiactl"):
        remedy = "update its driver to 580 or newer; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
        raise UserError(f"torch {torch.__version__} cannot use this machine's GPU: {remedy}")
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # With gloo for tensors on the CPU, counts do not wait for the GPU; the timeout is for a slow download
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)
    return device


def open_inputs(args, device: torch.device) -> tuple[dataset.StepDataset, Path, Path, dict]:
    """Check the inputs, and return data, folders of base and codec, settings that a resume must keep."""
    entries = dataset.load_manifest(args.train_manifest)
    base = lora.download("--base_ckpt", args.base_ckpt)
    codec = lora.download("--audio_tokenizer", args.audio_tokenizer)
    config, tokenizer = lora.open_base(base)
    settings = {name: getattr(args, name) for name in ("lora_r", "lora_alpha", "lora_dropout", "seed")}
    settings |= {
        "precision": str(lora.base_dtype(args.precision, device)),
        "manifest_fingerprint": lora.fingerprint([args.train_manifest]),
        "base_fingerprint": lora.fingerprint(base.glob("*.safetensors")),
        "codec_fingerprint": lora.fingerprint([codec / "config.json", codec / "model.pth"]),
    }
    cache = args.code_cache or args.train_manifest.parent / "code_cache"
    files = dataset.code_files(entries, cache, f"{settings['codec_fingerprint']} {device.type}")
    data = dataset.StepDataset(entries, files, tokenizer, dataset.build_collator(entries, config))
    return data, base, codec, settings


class LossModel(torch.nn.Module):
    """Gives the losses of a micro-batch; DDP wraps it. Takes the text head out of `model` for good."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        # To compute its 128,256 logits only where there is a text label
        self.model, self.text_head = model, model.audio_decoder_proj.text_lm_head
        model.audio_decoder_proj.text_lm_head = torch.nn.Identity()  # `logits` are then hidden states

    def forward(self, batch: dict) -> torch.Tensor:
        """Summed cross entropies, float32 (1 + num_codebooks,): of the text, then of each codebook."""
        weight = self.text_head.weight
        with torch.autocast(weight.device.type, torch.bfloat16, weight.dtype == torch.bfloat16):
            outputs = self.model(**batch)  # on a bfloat16 base the adapter computes in it, too
        # Logits at t predict label t + 1; a clip's first label is -100, so no clip's end predicts the next
        labels = outputs.expanded_labels[:, 1:]  # (B, T - 1)
        is_text = labels != -100
        logits = self.text_head(outputs.logits[:, :-1][is_text])  # (text labels, vocabulary)
        text_loss = F.cross_entropy(logits.float(), labels[is_text], reduction="sum")
        logits = outputs.audio_logits[:-1]  # (A - 1, num_codebooks, codebook_size + 2)
        labels = batch["label_audio_ids"][:, 1:].T.reshape(logits.shape[:2])  # (A - 1, num_codebooks)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return torch.cat([text_loss[None], losses.view(labels.shape).sum(0)])


def compute_gradients(model, micro_batches: list, label_counts: torch.Tensor, device) -> torch.Tensor:
    """Add up an optimizer step's gradients. Returns this rank's loss sums, float32 (1 + num_codebooks,)."""
    # label_counts (1 + num_codebooks,) are of all ranks; DDP averages over ranks in the last backward pass
    weights = (dist.get_world_size() / label_counts.clamp(min=1)).to(device)
    weights[1:] /= len(label_counts) - 1  # the audio loss is the mean over codebooks
    sums = torch.zeros_like(weights)
    model.zero_grad()
    for i, (batch, _) in enumerate(micro_batches, 1):
        model.require_backward_grad_sync = i == len(micro_batches)
        losses = model(dataset.to_tensors(batch, device))
        (losses * weights).sum().backward()
        sums += losses.detach()
    return sums


def wrap_in_ddp(adapter, data: dataset.StepDataset, lengths: list[int], args, device) -> tuple:
    """(DDP around the adapter's LossModel, the largest micro-batch, its counts), after a try of that one.

    `lengths` are the entries' positions. Raises UserError where memory runs out: now, and not hours later.
    """
    # All ranks drew the same adapter: init_sync would send the whole frozen base
    model = DDP(LossModel(adapter), broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True)
    most = min(args.max_tokens, args.batch_size * args.grad_accum * dist.get_world_size() * max(lengths))
    copies = [max(1, most // length) for length in lengths]  # how often each entry fits in
    largest = max(range(len(lengths)), key=lambda i: copies[i] * lengths[i])
    [(batch, counts)] = data[[[largest] * copies[largest]]]
    what = f"memory runs out with {copies[largest]} times entry {largest}, of {lengths[largest]} positions"
    with user_error(f"{what}: lower --max_tokens, or give --gradient_checkpointing", torch.OutOfMemoryError):
        for _ in range(2):  # DDP regroups its sums after the first: do it in new and resumed runs
            compute_gradients(model, [(batch, counts)], torch.from_numpy(counts[:-2]), device)
    return model, batch, counts


def build_optimizer(model, args, total_steps: int, state: dict):
    """AdamW and its cosine schedule; loads `state` into them, and into the adapter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": parameters, "initial_lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, fused=True)
    lora.restore(model, optimizer, state)
    # The library's steps 0 to total have a rate of 0 first, which would waste a step: take its 1 to total
    warmup, total = int(args.warmup_ratio * total_steps) + 1, total_steps + 1
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, total, last_epoch=state["step"])


def log_metrics(output_dir: Path, board: SummaryWriter, metrics: dict) -> None:
    """Append a line to metrics.jsonl, null for a number that is not finite, and points to TensorBoard."""
    with user_error("metrics.jsonl cannot be written"), open(output_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics).replace("NaN", "null").replace("Infinity", "null") + "\n")
    curves = {f"codebook_{k}": loss for k, loss in enumerate(metrics["audio_loss_per_codebook"])} | metrics
    for name in curves.keys() - {"step", "audio_loss_per_codebook"}:
        board.add_scalar(name, curves[name], metrics["step"])
    board.flush()


def train(args: argparse.Namespace) -> int:  # noqa: C901, as it is one story
    """Train on all ranks; rank 0 writes to args.output_dir. Returns the exit code: 143 after a signal."""
    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoint = lora.open_output(args.output_dir, args.resume_from_checkpoint)
    data, base, codec, settings = open_inputs(args, device)
    samples_per_step = args.batch_size * args.grad_accum * world_size
    settings["batch_size x grad_accum x ranks"] = samples_per_step
    state = lora.read_checkpoint(checkpoint, settings)
    dataset.encode_missing(data.code_files, lambda: lora.load_codec(codec, device), args.num_workers)
    lengths = dataset.measure_lengths(data, args.num_workers)
    total_steps = args.max_steps or math.ceil(args.epochs * len(lengths) / samples_per_step)
    adapter = lora.build_model(args, base, device)
    if rank == 0:
        board = SummaryWriter(args.output_dir / "runs", purge_step=state["step"] + 1)
        print(f"device: {device}, base in {settings['precision']}, max_tokens: {args.max_tokens}")
        print(f"{total_steps} steps of {samples_per_step} samples; a few hundred are wanted (not measured)")
    # A run is one stream of samples, a permutation by (seed, epoch) for each epoch; each step takes the next
    epochs = range(math.ceil(total_steps * samples_per_step / len(lengths)))
    orders = [np.random.default_rng((args.seed, epoch)).permutation(len(lengths)) for epoch in epochs]
    plan = np.concatenate(orders)[: total_steps * samples_per_step].reshape(total_steps, samples_per_step)

    def load_step(step):  # in a worker
        samples = sorted(plan[step].tolist(), key=lengths.__getitem__, reverse=True)
        share = dataset.split_evenly(samples, lengths, world_size)[rank]
        return data[dataset.split_into_micro_batches(share, lengths, args.max_tokens)]

    # Workers start before the first backward pass: a fork after NCCL's start can fail on InfiniBand
    steps = iter(dataset.in_workers(load_step, range(state["step"], total_steps), args.num_workers))
    model, _, _ = wrap_in_ddp(adapter, data, lengths, args, device)
    optimizer, schedule = build_optimizer(adapter, args, total_steps, state)
    stop = []  # no threading.Event: a signal in the handler of another could wait for its lock for ever
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm can send SIGUSR1 before its end
        signal.signal(number, lambda *_: stop.append(True))
    bar = tqdm(steps, "training", total_steps, initial=state["step"], disable=rank > 0)
    step = saved = logged = last_finite = state["step"]
    began, positions, skipped_steps = time.perf_counter(), torch.zeros(2), 0
    for micro_batches in bar:
        counts = torch.tensor([*sum(counts for _, counts in micro_batches), bool(stop)])
        dist.all_reduce(counts)  # over all ranks, also the number of those that a signal asked to stop
        label_counts, step_positions, stops = counts.split([len(counts) - 3, 2, 1])
        if stops > 0:  # all ranks know it now: save what the last step left, as torchrun kills after 30 s
            break
        step += 1
        # With the same micro-batches, this seed makes a resumed run's dropout the same
        torch.manual_seed(hash((args.seed, step, rank)))  # of integers, hash() is the same everywhere
        sums = compute_gradients(model, micro_batches, label_counts, device)
        grad_norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), args.max_grad_norm)
        if grad_norm.isfinite():
            optimizer.step()
            last_finite = step
        else:
            skipped_steps += 1  # in all, since this start
        positions += step_positions
        if step % args.logging_steps == 0 or step == total_steps:
            dist.all_reduce(sums)
            text_loss, *codebooks = (sums.cpu() / label_counts.clamp(min=1)).tolist()
            audio_loss = sum(codebooks) / len(codebooks)
            seconds = time.perf_counter() - began
            unpadded, padded = positions.tolist()
            metrics = {"step": step, "epoch": step * samples_per_step / len(lengths)}
            metrics |= {"loss": text_loss + audio_loss, "text_loss": text_loss, "audio_loss": audio_loss}
            metrics |= {"audio_loss_per_codebook": codebooks, "lr": schedule.get_last_lr()[0]}
            metrics |= {"grad_norm": grad_norm.item(), "skipped_steps": skipped_steps}
            metrics |= {"samples_per_s": (step - logged) * samples_per_step / seconds}
            metrics |= {"tokens_per_s": unpadded / seconds, "padding": 1 - unpadded / padded}
            metrics |= {"max_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
            if rank == 0:
                log_metrics(args.output_dir, board, metrics)
            bar.set_postfix(loss=metrics["loss"], saved=saved)
            logged, began, positions = step, time.perf_counter(), torch.zeros(2)
        if step - last_finite == min(10, total_steps):
            entries = plan[step - 1].tolist()
            raise UserError(f"no finite gradient after step {last_finite}: lower --lr; see entries {entries}")
        schedule.step()
        if rank == 0 and step % (args.save_steps or math.ceil(total_steps / 10)) == 0:
            lora.save_checkpoint(adapter, optimizer, settings, args, step)
            saved = step
    if rank == 0:
        if saved < step:
            lora.save_checkpoint(adapter, optimizer, settings, args, step)
        if step < total_steps:
            print(f"\nstopped at step {step}: all is saved; --resume_from_checkpoint auto goes on")
        elif step > state["step"] or not (args.output_dir / lora.ADAPTER_WEIGHTS).exists():
            lora.save_lora_adapters(adapter, args.output_dir, args, settings)
            print(f"\ndone: {step} steps, the adapter is in {args.output_dir}")
        else:
            print(f"\ndone before: {step} steps of {total_steps}; another run needs another --output_dir")
    dataset.gather(None)  # wait for rank 0 to save: torchrun ends all ranks when one has ended
    return 143 if step < total_steps else 0


def run_and_exit(function, *args) -> None:
    """Call function(*args), and exit with what it returns; with 1 and a message for a user's mistake."""
    sys.stdout.reconfigure(line_buffering=True)  # a pipe, too, has each line at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training handles it, Ctrl-C ends all at once
    exit_code = 1
    try:
        exit_code = function(*args) or 0
        dist.destroy_process_group()
    except Exception as error:
        # A DataLoader's worker puts its traceback before the message
        is_users, told = isinstance(error, UserError), f"error: {str(error).rpartition('UserError: ')[2]}"
        # A node's first rank tells a user's mistake at once; others wait, and torchrun ends them before that
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(0 if is_users and os.environ.get("LOCAL_RANK", "0") == "0" else 5)
        print(f"\n{told if is_users else traceback.format_exc()}", file=sys.stderr)
    os._exit(exit_code)  # without a wait for the workers, which end with this process


if __name__ == "__main__":
    run_and_exit(train, parse_args())
