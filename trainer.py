"""Training: fine-tune Higgs Audio v2 with LoRA, one process per GPU, or without torchrun one:
    torchrun --nproc_per_node=8 trainer.py --train_manifest train.json --output_dir out \
        --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \
        --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import lora
from dataset import PipelineError, blaming


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--train_manifest", type=Path, required=True, help="ChatML, a JSON array or JSONL")
    add("--code_cache", type=Path, help="default: code_cache beside the manifest")
    add("--num_workers", type=int, default=2, help="DataLoader workers of each rank")
    add = parser.add_argument_group("model: folders, NAMEs or NAME@REVISIONs").add_argument
    add("--base_ckpt", default="bosonai/higgs-audio-v2-generation-3B-base")
    add("--audio_tokenizer", default="bosonai/higgs-audio-v2-tokenizer", help="the codec")
    add("--return_audio_in_tokens", choices=["auto", "true", "false"], default="auto", help="false is deaf")
    add("--lora_r", type=int, default=16)
    add("--lora_alpha", type=int, default=32)
    add("--lora_dropout", type=float, default=0.05)
    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=int, default=2, help="samples of a forward, without --max_tokens")
    add("--max_tokens", type=int, help="its positions (default: what a GPU fits; 0: none)")
    add("--grad_accum", type=int, default=8, help="x batch_size x ranks: samples of a step")
    add("--lr", type=float, default=2e-4)
    add("--epochs", type=int, default=2)
    add("--max_steps", type=int, help="overrides --epochs")
    add("--warmup_ratio", type=float, default=0.03)
    add("--weight_decay", type=float, default=0.0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--seed", type=int, default=42)
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on GPU")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True)
    add("--logging_steps", type=int, default=10)
    add("--save_steps", type=int, help="default: what makes ten checkpoints")
    add("--save_total_limit", type=int, default=3)
    add("--resume_from_checkpoint", help="a folder, or auto: the newest, if any")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low = 1 if type(value) is int and name not in ("seed", "num_workers", "max_tokens") else 0
        high = 1 if name in ("lora_dropout", "warmup_ratio") else math.inf
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name} is {value}; expected {low} or more, at most {high}")
    return args


def join_ranks():
    """Join the process group, without torchrun of one: (device, rank, world_size)."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN attention plans anew for each length of a micro-batch, about a second each time
        torch.backends.cuda.enable_cudnn_sdp(False)
        backend = "cpu:gloo,cuda:nccl"  # counts and messages do not wait for the GPU
    alone = dist.HashStore(), 0, 1
    store, rank, world_size = next(rendezvous("env://")) if "RANK" in os.environ else alone
    # On one node torchrun keeps its store through restarts, with the dead ranks' addresses
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=12)
    )  # others wait while one downloads
    return device, rank, world_size


def on_all_ranks(function, *args, here=True):
    """Call `function` where `here`; a PipelineError ends all ranks, rank 0 tells."""
    problem = ""
    try:
        result = function(*args) if here else None
    except PipelineError as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        told = "\n".join(dict.fromkeys(filter(None, problems)))
        raise PipelineError(told if dist.get_rank() == 0 else "")
    return result


def on_rank_0(function, *args):
    """Call `function` on rank 0: all ranks get its result, or its PipelineError."""
    result = [on_all_ranks(function, *args, here=dist.get_rank() == 0)]
    dist.broadcast_object_list(result)
    return result[0]


def open_inputs(args, device):
    """Open and check all that a user can get wrong, before anything is loaded."""
    entries = dataset.load_manifest(args.train_manifest)
    base = lora.fetch("--base_ckpt", args.base_ckpt, lora.BASE_FILES)
    codec = lora.fetch("--audio_tokenizer", args.audio_tokenizer, lora.CODEC_FILES)
    config, tokenizer = lora.open_base(base)
    collator = dataset.build_collator(entries, config, args.return_audio_in_tokens)
    with blaming(f"--audio_tokenizer {codec}: no codec there"):
        weights = lora.fingerprint(codec / "config.json", codec / "model.pth")
    run = {
        "base_ckpt": lora.fingerprint(base / "config.json", *base.glob("*.safetensors")),
        "audio_tokenizer": weights,
        "train_manifest": lora.fingerprint(args.train_manifest),
        "lora_r": args.lora_r,
        "lora_alpha": args.lora_alpha,
        "seed": args.seed,
    }
    cache = args.code_cache or args.train_manifest.parent / "code_cache"
    with blaming(f"--code_cache {cache} cannot be made"):
        cache.mkdir(parents=True, exist_ok=True)
    clips = dataset.find_clips(entries, cache, f"{weights} {device.type}")
    data = dataset.StepDataset(entries, clips, tokenizer, collator, args.batch_size, args.max_tokens)
    return SimpleNamespace(data=data, base=base, codec=codec, run=run)


def encode_missing(inputs, device):
    """Encode the clips that the cache lacks, each on one rank. Collective."""
    missing = on_rank_0(dataset.find_missing, inputs.data.clips)
    if missing:
        codec = on_all_ranks(dataset.load_codec, inputs.codec, device)
        mine = missing[dist.get_rank() :: dist.get_world_size()]  # by size: equal shares
        on_all_ranks(dataset.encode_clips, mine, inputs.data.entries, codec, dist.get_rank() == 0)


def rehearse(args, model, text_head, data, lengths):
    """Run the largest micro-batch: out of memory shows now. Returns its Counts.

    Twice: DDP's second forward lays out its buckets anew. Later, ranks would hang, resumed runs differ.
    """
    if data.max_tokens is None and text_head.weight.is_cuda:
        torch.cuda.empty_cache()  # of the codec
        data.max_tokens = lora.fit_max_tokens(args, model.module.config, torch.cuda.mem_get_info()[0])
    samples = dataset.cut(zip(lengths, range(len(lengths)), strict=True), data.batch_size, data.max_tokens)
    largest = [i for _, i in max(samples, key=lambda samples: len(samples) * samples[0][0])]
    batch, counts = max(data[largest, True], key=lambda micro_batch: micro_batch[1].padded_positions)
    for _ in range(2):
        compute_gradients(model, text_head, [(batch, counts)], counts)
    model.zero_grad()
    return counts


def count_all(micro_batches, stop):
    """(Counts over all ranks, whether one is to `stop`), by one all_reduce on the CPU."""
    labels, *others = dataset.add_up(counts for _, counts in micro_batches)
    packed = torch.cat([labels, torch.tensor([*others, stop])])
    dist.all_reduce(packed)
    *others, stops = packed[len(labels) :].tolist()
    return dataset.Counts(packed[: len(labels)], *others), stops > 0


def compute_gradients(model, text_head, micro_batches, counts):
    """A step's gradients, averaged in its last backward; returns own loss sums."""
    weights = dist.get_world_size() / counts.labels.clamp(min=1)  # DDP averages: undo it
    weights[1:] /= len(weights) - 1  # the mean over codebooks
    weights = weights.to(text_head.weight.device, non_blocking=True)
    sums = torch.zeros_like(weights)
    for i, (batch, own) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            losses = forward(model, text_head, batch, own)
            loss = (losses * weights).sum()
            # If not finite, it makes gradients so on all ranks: none applies them
            loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan))
        sums += losses.detach()
    return sums


def forward(model, text_head, batch, counts):
    """Loss sums of a micro-batch; a bfloat16 base computes the adapter in bfloat16."""
    device, bf16 = text_head.weight.device, text_head.weight.dtype == torch.bfloat16
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        outputs = model(**batch)
    return loss_sums(outputs, batch, counts, text_head)


def loss_sums(outputs, batch, counts, text_head):
    """Summed cross entropies, float32 (1 + num_codebooks,): the text's, each codebook's.

    Position t of the logits predicts label t + 1: HiggsAudioModel.forward aligns them. A clip's
    first column is all -100: no shift crosses clips. The text labels' number is known: no sync.
    """
    labels = outputs.expanded_labels[:, 1:].flatten()  # (B * (T - 1),)
    selected = (labels != -100).nonzero_static(size=int(counts.labels[0])).squeeze(1)  # (text labels,)
    hidden = outputs.logits[:, :-1].flatten(0, 1)[selected]  # (text labels, hidden)
    text_sum = F.cross_entropy(text_head(hidden).float(), labels[selected], reduction="sum")
    logits = outputs.audio_logits[:-1]  # (A - 1, num_codebooks, codebook_size + 2)
    labels = batch["label_audio_ids"][:, 1:].T.reshape(logits.shape[:2])  # (A - 1, num_codebooks)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return torch.cat([text_sum[None], losses.view(labels.shape).sum(0)])


def catch_signals():
    """A list of the times of Ctrl-C and SIGTERM; one after 2 s ends at once."""
    times = []

    def note(number, _):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:  # sooner, torchrun passed on the first
            os._exit(128 + number)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return times


def ignore_signals(_):
    """In a DataLoader worker: signals reach the whole group; the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main(args):
    device, rank, world_size = join_ranks()
    checkpoint = on_rank_0(lora.open_output, args.output_dir, args.resume_from_checkpoint)
    inputs = on_all_ranks(open_inputs, args, device)
    data = inputs.data
    samples_per_step = args.batch_size * args.grad_accum * world_size
    steps_per_epoch = math.ceil(len(data.entries) / samples_per_step)
    total = args.max_steps or args.epochs * steps_per_epoch
    save_steps = args.save_steps or math.ceil(total / 10)
    run = {**inputs.run, "samples_per_step": samples_per_step}
    state = on_all_ranks(lora.read_checkpoint, checkpoint, run)
    first, history = state["step"], state["history"]
    if first >= total:
        on_rank_0(lora.publish, checkpoint, args.output_dir)  # a kill may have come first
        return on_rank_0(print, f"finished before: {first} steps, the adapter is in {args.output_dir}")

    encode_missing(inputs, device)
    lengths = on_all_ranks(dataset.measure, data)
    model, text_head = on_all_ranks(lora.build_model, args, inputs.base, device)
    parameters, optimizer, schedule = lora.build_optimizer(model, args, total, state)
    # All ranks drew the same adapter: init_sync would send the whole frozen base
    model = DDP(model, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True)
    rehearse(args, model, text_head, data, lengths)

    plan = lengths, samples_per_step, args.seed, world_size
    steps = dataset.deal_steps(*plan, range(first, total))
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=(shares[rank] for shares in steps),
        num_workers=args.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )
    board = lora.open_metrics(args.output_dir, history, first) if rank == 0 else None
    batches, signals = iter(loader), catch_signals()
    began, waited, interval, skipped, reported = time.perf_counter(), 0.0, [], 0, 0
    bar = tqdm(range(first + 1, total + 1), "training", initial=first, total=total, disable=rank > 0)
    for step in bar:
        waited -= time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter()
        # Dropout follows from these and the cut: no generator to save, resuming is exact
        torch.manual_seed(hash((args.seed, step, rank)))  # of integers: not random
        counts, stop = count_all(micro_batches, len(signals) > 0)
        sums = compute_gradients(model, text_head, micro_batches, counts)
        norm = lora.update(optimizer, schedule, parameters, args.max_grad_norm)
        interval.append(counts)
        skipped = skipped + ~norm.isfinite()
        if step % args.logging_steps == 0 or step == total:
            dist.all_reduce(sums)
            losses = (sums.cpu() / counts.labels.clamp(min=1)).tolist()  # CPU-GPU sync point
            metrics = lora.summarize(losses, interval, time.perf_counter() - began, waited) | {
                "step": step,
                "epoch": step / steps_per_epoch,
                "lr": schedule.get_last_lr()[0],
                "grad_norm": norm.item(),
                "skipped_steps": int(skipped),
            }
            on_rank_0(lora.log_metrics, args.output_dir, board, history, metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            if metrics["skipped_steps"] - reported == len(interval):  # not one was applied
                shares = next(dataset.deal_steps(*plan, range(step - 1, step)))
                on_all_ranks(
                    dataset.refuse,
                    "loss or gradient not finite; lower --lr, or look at",
                    [(f"step {step}", f"entries {[indices for indices, _ in shares]}")],
                )
            began, waited, interval, reported = time.perf_counter(), 0.0, [], metrics["skipped_steps"]
        if stop or step == total or (step % save_steps == 0 and norm.isfinite()):
            on_rank_0(lora.save_checkpoint, model.module, optimizer, run, args, history, step)
        if stop and step < total:
            return on_rank_0(print, f"stopped at step {step}; --resume_from_checkpoint auto goes on")
    on_rank_0(lora.publish, args.output_dir / f"checkpoint-{total}", args.output_dir)
    on_rank_0(print, f"done: {total} steps, the adapter is in {args.output_dir}")


def leave(code):
    """End now: Python's way out waits for workers, and gloo's threads can abort in it."""
    for worker in multiprocessing.active_children():
        worker.kill()  # they ignore SIGTERM
    sys.stdout.flush()
    os._exit(code)


def fail(kind, error, trace):
    """sys.excepthook. No destroy_process_group(): other ranks may be in a collective."""
    sys.stderr = sys.__stderr__  # torch.distributed calls this hook with a buffer there
    told = str(error).rpartition("PipelineError: ")[2]  # of a worker's traceback
    if kind is torch.OutOfMemoryError:
        told += "; try --gradient_checkpointing, smaller --batch_size or --max_tokens"
    if not issubclass(kind, (PipelineError, KeyboardInterrupt, torch.OutOfMemoryError)):
        sys.__excepthook__(kind, error, trace)
    elif told:
        print(f"error: {told}", file=sys.stderr, flush=True)
    leave(1)


if __name__ == "__main__":
    sys.excepthook = fail
    main(parse_args())
    dist.destroy_process_group()
    leave(0)
