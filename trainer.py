"""Fine-tune Higgs Audio v2 with LoRA, one process per GPU:

    torchrun --nproc_per_node=8 trainer.py --train_manifest train.json --output_dir out \
        --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \
        --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05

Without torchrun: one process. With --resume_from_checkpoint auto, the same command goes on wherever it was
killed, to the same adapter. What --output_dir receives, output.py says.
"""

import argparse
import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import lora
import output
from dataset import PipelineError

HALT = 3  # so many steps in a row that could not be applied end the run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--train_manifest", type=Path, required=True, help="JSON array or JSONL of ChatML samples")
    add("--code_cache", type=Path, help="folder for encoded clips (default: code_cache beside the manifest)")
    add("--num_workers", type=int, default=2, help="DataLoader workers of each rank")
    add = parser.add_argument_group("model").add_argument
    add("--base_ckpt", default="bosonai/higgs-audio-v2-generation-3B-base", help="folder or hub name")
    add("--audio_tokenizer", default="bosonai/higgs-audio-v2-tokenizer", help="the codec, likewise")
    add("--whisper_processor", default="openai/whisper-large-v3-turbo", help="where the base embeds Whisper")
    add("--return_audio_in_tokens", choices=["auto", "true", "false"], default="auto",
        help="whether user and system clips reach the model as codes: auto as its config says; false is deaf")
    add("--lora_r", type=int, default=16)
    add("--lora_alpha", type=int, default=32)
    add("--lora_dropout", type=float, default=0.05)
    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=int, default=2, help="samples of one forward")
    add("--max_tokens", type=int, help="its positions instead (default: on a GPU what fits; 0: no limit)")
    add("--grad_accum", type=int, default=8, help="a step takes batch_size x grad_accum x ranks samples")
    add("--lr", type=float, default=2e-4)
    add("--epochs", type=int, default=2)
    add("--max_steps", type=int, help="overrides --epochs")
    add("--warmup_ratio", type=float, default=0.03)
    add("--weight_decay", type=float, default=0.0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--seed", type=int, default=42)
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on GPUs")
    add("--gradient_checkpointing", action="store_true", help="less memory for half more time")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True)
    add("--logging_steps", type=int, default=10)
    add("--save_steps", type=int, default=500)
    add("--save_total_limit", type=int, default=3)
    add("--resume_from_checkpoint", help="a folder, or auto: the newest in --output_dir, if any")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low = 1 if type(value) is int and name not in ("seed", "num_workers", "max_tokens") else 0
        high = 1 if name in ("lora_dropout", "warmup_ratio") else math.inf
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name} is {value}; expected {low} or more" + ", at most 1" * (high == 1))
    return args


def join_ranks():
    """Join the process group: (its store, device, rank, world_size). Without torchrun: a group of one."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    store, rank, world_size = next(rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    # On one node torchrun keeps its store through restarts: the addresses of the dead ranks are in it
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # CPU tensors too have a backend, so that counts and messages never wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            store=store, rank=rank, world_size=world_size)
    return store, device, rank, world_size


def on_all_ranks(function, *args):
    """Call `function` on every rank; where one raises PipelineError all end, rank 0 with all messages."""
    result = problem = None
    try:
        result = function(*args)
    except PipelineError as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if problems := list(dict.fromkeys(filter(None, problems))):
        raise PipelineError("\n".join(problems)) if dist.get_rank() == 0 else SystemExit(1)
    return result


def on_rank_0(function, *args):
    """Call `function` on rank 0 alone: all ranks get its result, or end with its PipelineError."""
    result = [on_all_ranks(lambda: function(*args) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result)
    return result[0]


def encode_missing(clips, codec, device, num_workers, store):
    """Encode the clips that the cache lacks, each on one rank, counted in the group's `store`. Collective."""
    store = dist.PrefixStore(str(on_rank_0(time.time_ns)), store)  # where nothing has been counted yet
    if missing := [clips[i] for i in on_rank_0(dataset.find_missing, clips)]:
        codec = on_all_ranks(lora.load_codec, codec, device)
        on_all_ranks(lora.encode_clips, missing, codec, num_workers, store, dist.get_rank() == 0)


def loss_sums(outputs, batch, counts, text_head):
    """Summed cross entropy in float32, (1 + num_codebooks,): of the text labels, then of each codebook's.

    Position t of the logits predicts label t + 1: HiggsAudioModel.forward aligns them. The first column of an
    audio segment is all -100: no shift crosses clips. counts[0] text labels are selected without a sync.
    """
    labels = outputs.expanded_labels[:, 1:].flatten()  # (B * (T - 1),)
    selected = (labels != -100).nonzero_static(size=int(counts[0])).squeeze(1)  # (text labels,)
    hidden = outputs.logits[:, :-1].flatten(0, 1)[selected]  # (text labels, hidden): the head was taken out
    text_sum = F.cross_entropy(text_head(hidden).float(), labels[selected], reduction="sum")
    audio_logits = outputs.audio_logits[:-1]  # (A - 1, num_codebooks, codebook_size + 2), all clips in a row
    labels = batch["label_audio_ids"][:, 1:].T.reshape(audio_logits.shape[:2])  # (A - 1, num_codebooks)
    losses = F.cross_entropy(audio_logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return torch.cat([text_sum[None], losses.view(labels.shape).sum(0)])


def compute_gradients(model, text_head, micro_batches, halt):
    """Forward and backward over a step's micro-batches; the last one also averages the gradients over ranks.

    Returns (this rank's loss sums, still on the device, (1 + num_codebooks,); counts over all ranks, as
    StepDataset gives them), or None: a rank's `halt` (see main) made all agree to stop before the last one.
    """
    dist.all_reduce(counts := sum(counts for _, counts in micro_batches))  # (num_codebooks + 4,), on the CPU
    weights = dist.get_world_size() / counts[:-3].clamp(min=1)  # DDP averages over ranks: undo it
    weights[1:] /= len(weights) - 1
    weights = weights.to(text_head.weight.device, non_blocking=True)  # the default waits for the whole GPU
    sums = torch.zeros_like(weights)
    for i, (batch, own_counts) in enumerate(micro_batches):
        last, asked = i == len(micro_batches) - 1, halt.max()
        if last:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked >= HALT:
            continue
        with contextlib.nullcontext() if last else model.no_sync():
            losses = loss_sums(*lora.forward(model, batch, text_head), own_counts, text_head)
            loss = (losses * weights).sum()
            loss.backward(1 + 0 * loss.detach())  # not finite, it makes the gradients so, on all ranks
        sums += losses.detach()
    return None if asked >= HALT else (sums, counts)


def rehearse(model, text_head, data, lengths):
    """Forward and backward of the largest micro-batch, twice, no update: out-of-memory shows now.

    Twice: DDP's second forward lays out its buckets anew, and later ranks with more micro-batches would wait
    there, and a resumed run add up in another order. Returns the counts. Without --max_tokens, a GPU takes
    the power of two up to 16384 that 3/4 of its free memory hold, by what the longest sample takes here.
    """
    if choose := text_head.weight.is_cuda and data.max_tokens is None:
        torch.cuda.reset_peak_memory_stats()  # the codec's
        data.max_tokens = 1  # one sample a forward
    samples = dataset.cut(zip(lengths, range(len(lengths))), data.batch_size, data.max_tokens)
    largest = [i for _, i in max(samples, key=lambda samples: len(samples) * samples[0][0])]
    batch, counts = max(data[largest, True], key=lambda micro_batch: micro_batch[1][-1])
    try:
        for _ in range(2):
            compute_gradients(model, text_head, [(batch, counts)], torch.zeros(1))
    except torch.OutOfMemoryError:
        raise PipelineError(f"out of memory on {counts[-1]} positions of entries {largest}; drop the longest,"
                            " try --gradient_checkpointing, smaller --batch_size or --max_tokens") from None
    model.zero_grad()
    if choose:
        taken = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / counts[-1].item()
        torch.cuda.empty_cache()
        data.max_tokens = 2 ** int(math.log2(min(0.75 * torch.cuda.mem_get_info()[0] / taken, 16_384)))
        return rehearse(model, text_head, data, lengths)
    return counts


def update(optimizer, schedule, parameters, max_grad_norm):
    """Clip and step; a gradient that is not finite is not applied. Returns its norm, still on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.found_inf = (~norm.isfinite()).float()  # as GradScaler does; fused AdamW reads it on the device
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm


def catch_signals(halt):
    """Ctrl-C and SIGTERM: before training (halt[0] < 0) exit, then ask to stop, a second one ends at once."""
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    def watch():  # in a thread: a handler would wait while the main thread waits for other ranks
        first = None
        while number := os.read(arrived, 1)[0]:
            if number in (signal.SIGINT, signal.SIGTERM):
                first = first or time.monotonic()
                if halt[0] < 0 or time.monotonic() - first > 2:  # sooner, torchrun passed on the first
                    os._exit(128 + number if halt[0] > 0 or "RANK" in os.environ else 0)
                halt[0] = HALT
    threading.Thread(target=watch, daemon=True).start()


def main(args):
    store, device, rank, world_size = join_ranks()
    # Reasons to stop, from HALT on: a signal; steps in a row not applied (counted and copied by the device)
    catch_signals(halt := torch.tensor([-1, 0], pin_memory=device.type == "cuda"))
    resumed = on_rank_0(output.open_output, args.output_dir, args.resume_from_checkpoint)
    entries, clips, codec, tokenizer, collator, run = on_all_ranks(lora.open_inputs, args, device)
    run["samples_per_step"] = samples_per_step = args.batch_size * args.grad_accum * world_size
    steps_per_epoch = -(-len(entries) // samples_per_step)
    total = args.max_steps or args.epochs * steps_per_epoch
    state = on_all_ranks(output.read_checkpoint, resumed, run) if resumed else {"step": 0}
    if (first := state["step"]) >= total:
        on_rank_0(output.publish, resumed, args.output_dir)  # killed just before that, it would be missing
        return on_rank_0(print, f"finished before: {first} steps, the adapter is in {args.output_dir}")
    encode_missing(list(clips.values()), codec, device, args.num_workers, store)
    lengths, frames = on_all_ranks(dataset.measure, entries, clips, collator)
    data = dataset.StepDataset(entries, clips, tokenizer, collator, args.batch_size, args.max_tokens)
    model, text_head = on_all_ranks(lora.build_model, args, device)
    parameters, optimizer, schedule = lora.build_optimizer(model, args, total, state)
    model = lora.distribute(model)
    rehearse(model, text_head, data, lengths)
    deal = functools.partial(dataset.deal_steps, lengths, samples_per_step, args.seed, rank, world_size)
    loader = DataLoader(data, batch_size=None, sampler=deal(range(first, total)), pin_memory=halt.is_pinned(),
                        num_workers=args.num_workers, worker_init_fn=dataset.ignore_signals)
    board = output.open_board(args.output_dir, first) if rank == 0 else None
    save = functools.partial(on_rank_0, output.save_checkpoint, args.output_dir, model.module, optimizer, run,
                             output.describe(args, entries, frames, run, total), args.save_total_limit)
    halt[0], (in_a_row, skipped) = 0, torch.zeros(2, dtype=torch.int64, device=device)
    bar = tqdm(range(first + 1, total + 1), "training", initial=first, total=total, disable=rank > 0)
    batches, since, waited, seen, done = iter(loader), time.perf_counter(), 0.0, 0, first
    for step in bar:
        waited -= time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter()
        # Dropout follows from these three alone: no generator state to save, and resuming is exact
        torch.manual_seed(hash((args.seed, step, rank)))  # of integers: the same in every process
        if not (result := compute_gradients(model, text_head, micro_batches, halt)):
            break
        (sums, counts), done = result, step
        norm = update(optimizer, schedule, parameters, args.max_grad_norm)
        in_a_row = (in_a_row + 1) * (~norm.isfinite() | (in_a_row >= HALT))
        halt[1:].copy_(in_a_row, non_blocking=True)
        skipped, seen = skipped + ~norm.isfinite(), seen + counts[-3:]
        if step % args.logging_steps == 0 or step == total:
            dist.all_reduce(sums)
            losses = sums.cpu() / counts[:-3].clamp(min=1)  # CPU-GPU sync point
            on_rank_0(output.report, args.output_dir, board, losses.tolist(), seen.tolist(), waited,
                      time.perf_counter() - since, {
                          "step": step, "epoch": step / steps_per_epoch, "lr": schedule.get_last_lr()[0],
                          "grad_norm": norm.item(), "skipped_steps": skipped.item()})
            bar.set_postfix(loss=f"{losses[0] + losses[1:].mean():.3f}")
            since, waited, seen = time.perf_counter(), 0.0, 0
        if (step % args.save_steps == 0 or step == total) and in_a_row < HALT:
            save(step)
    bad = range(done - int(in_a_row * (in_a_row >= HALT)), done)
    if first < bad.start < total and bad.start % args.save_steps:
        save(bad.start)
    on_all_ranks(dataset.refuse, "loss or gradient not finite, no step applied; lower --lr, or look at",
                 [(f"step {step + 1}", f"entries {share}") for step, (share, _) in zip(bad, deal(bad))])
    if done < total:
        return on_rank_0(print, f"stopped at step {done}; --resume_from_checkpoint auto goes on")
    on_rank_0(output.publish, args.output_dir / f"checkpoint-{total}", args.output_dir)
    on_rank_0(print, f"done: {total} steps, the adapter is in {args.output_dir}")


@atexit.register
def leave():
    """At any end: the group's threads could abort the process, its workers ignore Python's SIGTERM."""
    dist.destroy_process_group() if dist.is_initialized() else None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each that is killed
    for worker in multiprocessing.active_children():
        worker.kill()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (PipelineError, torch.OutOfMemoryError) as error:  # a worker's comes with its traceback
        sys.exit("error: " + str(error).rpartition("PipelineError: ")[2])
