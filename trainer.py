"""Fine-tune Higgs Audio v2 with LoRA, one process per GPU; without torchrun, one process in all.

torchrun --nproc_per_node=8 trainer.py --train_manifest train.json --output_dir out \\
    --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \\
    --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import set_peft_model_state_dict
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import dataset
import lora
from dataset import UserError, user_error

# (name, type, default, help) of the flags
FLAGS = [
    ("base_ckpt", str, lora.BASE, "the base: a folder, or NAME or NAME@REVISION on the hub"),
    ("audio_tokenizer", str, lora.CODEC, "the codec: a folder, or NAME or NAME@REVISION on the hub"),
    ("code_cache", Path, None, "folder of the encoded clips (None: code_cache beside the manifest)"),
    ("lora_r", int, 16, "rank of the LoRA matrices"),
    ("lora_alpha", int, 32, "the adapter's output is scaled by lora_alpha / lora_r"),
    ("lora_dropout", float, 0.05, "dropout of the adapter's input"),
    ("batch_size", int, 2, "samples of a micro-batch, where max_tokens sets no limit"),
    ("grad_accum", int, 8, "a step has batch_size x grad_accum x ranks samples"),
    ("max_tokens", int, None, "positions of a micro-batch with padding (None: what a GPU fits; 0: no limit)"),
    ("lr", float, 2e-4, "highest learning rate of the cosine schedule"),
    ("warmup_ratio", float, 0.03, "share of the steps in which the learning rate rises from 0"),
    ("weight_decay", float, 0.0, "AdamW's weight decay"),
    ("max_grad_norm", float, 1.0, "the gradient is clipped to this norm (0: never)"),
    ("epochs", int, 2, "how often each sample is trained"),
    ("max_steps", int, None, "number of optimizer steps (None: as many as --epochs makes)"),
    ("seed", int, 42, "of the order of samples, of LoRA's first weights and of dropout"),
    ("num_workers", int, None, "DataLoader workers a rank (None: half of its cores, 16 at most)"),
    ("logging_steps", int, 10, "steps between two lines of metrics"),
    ("save_steps", int, None, "steps between two checkpoints (None: at most ten checkpoints a run)"),
    ("save_total_limit", int, 10, "how many of the newest checkpoints are kept, of 0.5 GB each"),
    ("resume_from_checkpoint", str, None, "a checkpoint's folder, or auto: output_dir's newest, if any"),
]
HIGHEST = {"batch_size": 4096, "grad_accum": 10**5, "lora_r": 4096, "num_workers": 256, "seed": 2**63 - 1}
HIGHEST |= {"lora_dropout": 0.99, "warmup_ratio": 1}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each flag's default, and keep the line breaks of the commands."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. A number out of range ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    needed = {"type": Path, "required": True, "default": argparse.SUPPRESS}  # no default in the help
    add("--train_manifest", help="the samples: ChatML in a JSON array, or JSONL", **needed)
    add("--output_dir", help="gets the adapter, checkpoints and metrics", **needed)
    heard = "whether references in user and system turns are heard (auto: as the base's config says)"
    add("--return_audio_in_tokens", choices=["auto", "false"], default="auto", help=heard)
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU")
    add("--gradient_checkpointing", action="store_true", help="compute each layer twice, to save memory")
    for name, kind, default, explanation in FLAGS:
        add(f"--{name}", type=kind, default=default, help=explanation)
    args = parser.parse_args(argv)
    if args.num_workers is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) // ranks
        args.num_workers = min(16, max(1, cores // 2))
    for name, value in vars(args).items():
        low = 0 if isinstance(value, float) or name in ("seed", "num_workers", "max_tokens") else 1
        high = 10**9 if isinstance(value, int) else sys.float_info.max
        high = HIGHEST.get(name, high)
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name} is {value}; expected {low} or more, at most {high}")
    return args


def choose_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none. Raises UserError for a GPU that cannot be used."""
    if torch.cuda.is_available():
        # cuDNN attention makes a plan for each new length, which takes about a second each time
        torch.backends.cuda.enable_cudnn_sdp(False)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        if ranks > gpus:
            raise UserError(f"--nproc_per_node is {ranks}, but the number of GPUs here is {gpus}")
        # Micro-batches differ in shape, which would fragment the memory in segments of fixed size
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    is_wanted = torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    if is_wanted and (os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi")):
        raise UserError(
            f"the NVIDIA driver of this machine is too old for torch {torch.__version__}, or sees no GPU: "
            "update it to 580 or newer, or install a torch for its CUDA; CUDA_VISIBLE_DEVICES= uses the CPU"
        )
    return torch.device("cpu")


def describe_device(args, device: torch.device) -> str:
    """What a run computes with, to be read before anything large is loaded."""
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    tokens = "automatic" if args.max_tokens is None else args.max_tokens
    return (
        f"device: {device} ({name}), base in {lora.base_dtype(args.precision, device)}, max_tokens {tokens}"
    )


def join_ranks(device: torch.device) -> None:
    """Join torchrun's process group, or make one of a single rank. Raises UserError."""
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        with user_error("RANK is set, but not all that torchrun sets; start with torchrun"):
            store, rank, world_size = next(rendezvous("env://"))
    # On one node torchrun's store outlives a restart: a new prefix hides the addresses of dead ranks
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # With gloo for tensors on the CPU, counts and messages do not wait for the GPU
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(hours=12)  # ranks wait while one of them downloads or encodes
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def on_all_ranks(function, *args, here: bool = True):
    """Call `function` on each rank that is `here`; a UserError of any rank is raised on all of them."""
    result, problem = None, None
    try:
        if here:
            result = function(*args)
    except UserError as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise UserError("\n".join(dict.fromkeys(filter(None, problems))))
    return result


def on_rank_0(function, *args):
    """Call `function` on rank 0; all ranks get its result, or its UserError."""
    results = [on_all_ranks(function, *args, here=dist.get_rank() == 0)]
    dist.broadcast_object_list(results)
    return results[0]


def open_inputs(args, device: torch.device) -> tuple[dataset.StepDataset, Path, Path, dict]:
    """Open and check all that a user can get wrong, before anything large is loaded. Raises UserError.

    Returns the data, the folders of base and codec, and the settings that a resume must keep.
    """
    entries = dataset.load_manifest(args.train_manifest)
    base = lora.download("--base_ckpt", args.base_ckpt, lora.BASE_FILES)
    codec = lora.download("--audio_tokenizer", args.audio_tokenizer, lora.CODEC_FILES)
    config, tokenizer = lora.open_base(base)
    collator = dataset.build_collator(entries, config, args.return_audio_in_tokens)
    names = "lora_r", "lora_alpha", "lora_dropout", "seed"
    run = {name: getattr(args, name) for name in names}
    run["train_manifest"] = hashlib.sha256(args.train_manifest.read_bytes()).hexdigest()
    run["base_ckpt"] = lora.base_fingerprint(base)
    run["audio_tokenizer"] = dataset.codec_fingerprint(codec)
    run["return_audio_in_tokens"] = collator.return_audio_in_tokens
    run["precision"] = str(lora.base_dtype(args.precision, device))
    cache = args.code_cache or args.train_manifest.parent / "code_cache"
    files = dataset.code_files(entries, cache, f"{run['audio_tokenizer']} {device.type}")
    data = dataset.StepDataset(entries, files, tokenizer, collator, args.batch_size, args.max_tokens)
    return data, base, codec, run


def encode_missing(data: dataset.StepDataset, codec: Path, device: torch.device, num_workers: int) -> None:
    """Encode the clips that the cache lacks, each on one rank. All ranks must call it. Raises UserError."""
    missing = on_rank_0(dataset.find_missing, data.code_files)
    if missing:
        on_rank_0(dataset.check_cache, missing[0][1].parent)
        model = on_all_ranks(dataset.load_codec, codec, device)
        rank = dist.get_rank()
        mine = missing[rank :: dist.get_world_size()]  # sorted by size: equal shares
        on_all_ranks(dataset.encode_clips, mine, data.entries, model, num_workers, rank == 0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of the codec


class LossModel(torch.nn.Module):
    """A base or PEFT model, and its text head: gives the losses of a micro-batch. DDP wraps it.

    The head is taken out of the base, to compute its 128,256 logits only where there is a text label.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.text_head = model, model.audio_decoder_proj.text_lm_head
        model.audio_decoder_proj.text_lm_head = torch.nn.Identity()  # `logits` are then hidden states

    def forward(self, batch: dict, num_text_labels: int) -> torch.Tensor:
        """Loss sums of a micro-batch, as in sum_losses. On a bfloat16 base the adapter computes in it too."""
        weight = self.text_head.weight
        is_bf16 = weight.dtype == torch.bfloat16
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=is_bf16):
            outputs = self.model(**batch)
        return self.sum_losses(outputs, batch["label_audio_ids"], num_text_labels)

    def sum_losses(self, outputs, label_audio_ids: torch.Tensor, num_text_labels: int) -> torch.Tensor:
        """Summed cross entropies, float32 (1 + num_codebooks,): of the text, then of each codebook.

        Logits at t predict label t + 1: HiggsAudioModel.forward aligns them. Clips lie one behind another;
        a clip's first label is -100, so the end of one clip is never trained to predict the next.
        """

        def sum_chunk(hidden, labels):
            return F.cross_entropy(self.text_head(hidden).float(), labels, reduction="sum")

        labels = outputs.expanded_labels[:, 1:].flatten()  # (B * (T - 1),)
        # nonzero() would make the CPU wait for the GPU, to learn a number that is known
        positions = (labels != -100).nonzero_static(size=num_text_labels).squeeze(1)  # (text labels,)
        hidden = outputs.logits[:, :-1].flatten(0, 1)[positions]  # (text labels, hidden)
        # A label's logits take 2 MB: 512 labels at a time, and again in the backward pass
        chunks = zip(hidden.split(512), labels[positions].split(512), strict=True)
        text_loss = sum(recompute_in_backward(sum_chunk, *c, use_reentrant=False) for c in chunks)
        logits = outputs.audio_logits[:-1]  # (A - 1, num_codebooks, codebook_size + 2)
        labels = label_audio_ids[:, 1:].T.reshape(logits.shape[:2])  # (A - 1, num_codebooks)
        logits = logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)
        return torch.cat([text_loss[None], losses.sum(0)])


def compute_gradients(model, micro_batches: list, label_counts: torch.Tensor, device) -> torch.Tensor:
    """Add up an optimizer step's gradients; DDP averages them over ranks in the last backward pass.

    label_counts (1 + num_codebooks,) are of all ranks and micro-batches. Returns this rank's loss sums.
    """
    weights = dist.get_world_size() / label_counts.clamp(min=1)  # undoes DDP's average over ranks
    weights[1:] /= len(label_counts) - 1  # the audio loss is the mean over codebooks
    weights = weights.to(device)
    sums = torch.zeros_like(weights)
    for i, (batch, counts) in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else model.no_sync():
            losses = model(dataset.to_tensors(batch, device), int(counts[0]))
            (losses * weights).sum().backward()
        sums += losses.detach()
    return sums


def choose_max_tokens(args, model, state: dict, device: torch.device) -> int:
    """Padded positions of a micro-batch: the flag's, the resumed run's, or what each rank's GPU fits."""
    if args.max_tokens is not None:
        return args.max_tokens
    if state["step"]:
        return state["run"]["max_tokens"]  # with other micro-batches dropout would differ
    if device.type == "cpu":
        return 0
    torch.cuda.empty_cache()  # of the codec
    free_bytes, _ = torch.cuda.mem_get_info()
    fitting = torch.tensor(lora.fit_max_tokens(args, model, free_bytes))
    dist.all_reduce(fitting, dist.ReduceOp.MIN)
    return int(fitting)


def build_optimizer(model, args, total_steps: int, state: dict):
    """AdamW and its cosine schedule; loads `state` into them, and into the adapter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": parameters, "initial_lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if state["step"]:
        set_peft_model_state_dict(model, state["adapter"])
        groups = optimizer.state_dict()["param_groups"]  # learning rate, weight decay: the command line's
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    warmup_steps = int(args.warmup_ratio * total_steps)
    last = state["step"] - 1
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps, last_epoch=last)


def run_largest(model, optimizer, data: dataset.StepDataset, lengths: list[int], device) -> tuple:
    """Run the largest micro-batch twice, without an update, so that memory does not run out later.

    Twice, as DDP reorders its buckets, and so its sums, after the first backward pass: a resumed run then
    adds in the order of one that never stopped. Returns the micro-batch.
    """

    def fitting(length):  # samples
        return max(1, data.max_tokens // length) if data.max_tokens else data.batch_size

    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    padded = [lengths[i] * min(fitting(lengths[i]), len(order) - k) for k, i in enumerate(order)]
    first = padded.index(max(padded))
    # `lengths` are estimates: of twice as many samples, take by their true lengths what fits
    candidates = order[first : first + 2 * fitting(lengths[order[first]])]
    group = sorted(((data.load_sample(i)[0], i) for i in candidates), reverse=True)
    size = fitting(group[0][0])
    uncut = dataclasses.replace(data, max_tokens=0, batch_size=size)
    [(batch, counts)] = uncut[[i for _, i in group[:size]]]
    # AdamW's first step makes two moments of each weight; those of a resumed run are there
    trained = optimizer.param_groups[0]["params"]
    moments = [] if optimizer.state else [torch.empty_like(parameter) for parameter in trained * 2]
    label_counts = torch.from_numpy(counts[:-2])
    for _ in range(2):
        compute_gradients(model, [(batch, counts)], label_counts, device)
    del moments
    model.zero_grad()
    return batch, counts


def open_metrics(output_dir: Path, step: int) -> SummaryWriter:
    """TensorBoard's writer. Drops metrics.jsonl's lines after `step`: those steps run again."""
    file = output_dir / "metrics.jsonl"
    with user_error(f"--output_dir {output_dir} cannot be written"):
        kept = []
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):  # a kill can cut the last line off
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        file.with_suffix(".unfinished").write_text("".join(kept))
        file.with_suffix(".unfinished").replace(file)
        return SummaryWriter(output_dir / "runs", purge_step=step + 1)


def log_metrics(output_dir: Path, board: SummaryWriter, metrics: dict) -> None:
    """Add a line to metrics.jsonl, with null for a number that is not finite, and points to TensorBoard."""
    text = re.sub("-?(NaN|Infinity)", "null", json.dumps(metrics))
    curves = metrics | {f"codebook_{k}": loss for k, loss in enumerate(metrics["audio_loss_per_codebook"])}
    with user_error(f"--output_dir {output_dir} cannot be written"):
        with open(output_dir / "metrics.jsonl", "a") as stream:
            stream.write(text + "\n")
        for name in curves.keys() - {"step", "audio_loss_per_codebook"}:
            board.add_scalar(name, curves[name], metrics["step"])
        board.flush()


def peak_memory() -> float:
    """Peak gigabytes: the GPU allocator's or, without a GPU, the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def train(args: argparse.Namespace) -> None:
    """Train on all ranks; rank 0 writes the adapter, checkpoints and metrics to args.output_dir."""
    device = choose_device()
    join_ranks(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoint = on_rank_0(lora.open_output, args.output_dir, args.resume_from_checkpoint)
    on_rank_0(print, describe_device(args, device))
    data, base, codec, run = on_all_ranks(open_inputs, args, device)
    samples_per_step = run["samples_per_step"] = args.batch_size * args.grad_accum * world_size
    state = on_all_ranks(lora.read_checkpoint, checkpoint, run)
    encode_missing(data, codec, device, args.num_workers)
    lengths = on_all_ranks(dataset.estimate_lengths, data)
    total_steps = args.max_steps or math.ceil(args.epochs * len(lengths) / samples_per_step)
    save_steps = args.save_steps or math.ceil(total_steps / 10)

    adapter = on_all_ranks(lora.build_model, args, base, device)
    data.max_tokens = run["max_tokens"] = choose_max_tokens(args, adapter, state, device)
    on_rank_0(print, f"max_tokens: {data.max_tokens or 'no limit, --batch_size samples a micro-batch'}")
    optimizer, schedule = build_optimizer(adapter, args, total_steps, state)
    # All ranks drew the same adapter: init_sync would send the whole frozen base
    model = DDP(LossModel(adapter), broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True)
    run_largest(model, optimizer, data, lengths, device)
    _set_pg_timeout(timedelta(minutes=15))  # from here on, a longer wait means that a rank hangs

    def samples_of(step):
        return dataset.samples_of_step(step, len(lengths), samples_per_step, args.seed)

    def load_step(step):  # in a worker
        shares = dataset.split_over_ranks(samples_of(step), lengths, world_size)
        return data[shares[rank]]

    steps = dataset.in_workers(load_step, range(state["step"], total_steps), args.num_workers)
    board = on_all_ranks(open_metrics, args.output_dir, state["step"], here=rank == 0)
    stop = []  # a list, as a second signal's handler could wait for a threading.Event's lock for ever
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm can send SIGUSR1 before its end
        signal.signal(number, lambda *_: stop.append(True))
    began, waited, positions, logged_step = time.perf_counter(), 0.0, 0, state["step"]
    skipped = skipped_in_a_row = 0
    bar = tqdm(total=total_steps, initial=state["step"], desc="training", disable=rank > 0)
    told = {"saved": state["step"]}  # beside the bar
    for step in range(state["step"] + 1, total_steps + 1):
        waited -= time.perf_counter()
        micro_batches = on_all_ranks(next, steps)
        waited += time.perf_counter()
        # With the same micro-batches, this seed makes a resumed run's dropout the same
        torch.manual_seed(hash((args.seed, step, rank)))  # of integers, hash() is the same everywhere
        own_counts = sum(counts for _, counts in micro_batches)
        counts = torch.tensor([*own_counts, bool(stop)])
        dist.all_reduce(counts)  # label counts, positions without and with padding, ranks asked to stop
        label_counts = counts[:-3]
        positions += counts[-3:-1]
        sums = compute_gradients(model, micro_batches, label_counts, device)
        max_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), max_norm)
        is_finite = bool(grad_norm.isfinite())
        if is_finite:
            optimizer.step()
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
        optimizer.zero_grad()
        schedule.step()
        is_last = step == total_steps
        gives_up = skipped_in_a_row == min(10, total_steps - state["step"])
        if step % args.logging_steps == 0 or is_last or gives_up:
            dist.all_reduce(sums)
            text_loss, *codebooks = (sums.cpu() / label_counts.clamp(min=1)).tolist()
            audio_loss = sum(codebooks) / len(codebooks)
            seconds = time.perf_counter() - began
            metrics = {
                "step": step,
                "epoch": step * samples_per_step / len(lengths),
                "loss": text_loss + audio_loss,
                "text_loss": text_loss,
                "audio_loss": audio_loss,
                "audio_loss_per_codebook": codebooks,
                "lr": schedule.get_last_lr()[0],
                "grad_norm": grad_norm.item(),
                "skipped_steps": skipped,
                "samples_per_s": (step - logged_step) * samples_per_step / seconds,
                "tokens_per_s": positions[0].item() / seconds,
                "padding": 1 - (positions[0] / positions[1]).item(),
                "data_wait": waited / seconds,
                "max_memory_gb": peak_memory(),
            }
            on_rank_0(log_metrics, args.output_dir, board, metrics)
            told["loss"] = f"{metrics['loss']:.3f}"
            told["samples/s"] = f"{metrics['samples_per_s']:.1f}"
            began, waited, positions, logged_step = time.perf_counter(), 0.0, 0, step
        if gives_up:
            raise UserError(
                f"loss or gradient not finite up to step {step}: lower --lr, or look at its entries "
                f"{samples_of(step - 1)}; the last checkpoint is {checkpoint or 'none'}"
            )
        stops = counts[-1] > 0
        if stops or is_last or (step % save_steps == 0 and is_finite):
            on_rank_0(lora.save_checkpoint, adapter, optimizer, run, args, step)
            checkpoint = args.output_dir / f"checkpoint-{step}"
            told["saved"] = step
        bar.set_postfix(told, refresh=False)
        bar.update()
        if stops and not is_last:
            resume = "all is saved; --resume_from_checkpoint auto goes on"
            return on_rank_0(print, f"\nstopped at step {step}: {resume}")
    on_rank_0(lora.publish, checkpoint, args.output_dir)
    on_rank_0(print, f"\ndone: {max(total_steps, state['step'])} steps, the adapter is in {args.output_dir}")


def run_and_exit(function, *args) -> None:
    """Call function(*args) and end this process: exit code 1 and a message on rank 0 for a user's mistake.

    Python's own way out would wait for DataLoader workers, and gloo's threads can abort in it.
    """
    exit_code, message = 1, None
    sys.stdout.reconfigure(line_buffering=True)  # a pipe, too, has each line at once
    try:
        function(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
        exit_code = 0
    except UserError as error:  # all ranks raise it, one tells it
        rank = "RANK" if dist.is_initialized() else "LOCAL_RANK"
        message = str(error) if os.environ.get(rank, "0") == "0" else None
    except torch.OutOfMemoryError as error:
        message = f"{error}; try --gradient_checkpointing, smaller --batch_size or --max_tokens"
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        if str(error).startswith("DataLoader "):
            message = f"{error}: memory or a disk may be at fault; --num_workers 0 tells more"
        else:
            traceback.print_exc()
    if message:
        print(f"\nerror: {message}", file=sys.stderr)
    for worker in multiprocessing.active_children():
        worker.kill()  # it ignores SIGTERM
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    run_and_exit(train, parse_args())
