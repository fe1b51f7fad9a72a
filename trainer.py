"""Fine-tune Higgs Audio v2 with LoRA, one process per GPU:

    torchrun --nproc_per_node=8 trainer.py --train_manifest train.json --output_dir out \
        --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \
        --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05

Without torchrun: one process. --output_dir receives the adapter, checkpoint-<step>/, metrics.jsonl and runs/.
"""

import argparse
import atexit
import contextlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import dataset
import lora
from dataset import PipelineError


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
    add("--max_tokens", type=int, help="cut by positions, with padding, instead; a longer sample runs alone")
    add("--grad_accum", type=int, default=8, help="a step takes batch_size x grad_accum x ranks samples")
    add("--lr", type=float, default=2e-4)
    add("--epochs", type=int, default=2)
    add("--max_steps", type=int, help="overrides --epochs")
    add("--warmup_ratio", type=float, default=0.03)
    add("--weight_decay", type=float, default=0.0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--seed", type=int, default=42)
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on GPUs")
    add("--gradient_checkpointing", action="store_true", help="less memory for a third more time")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True)
    add("--logging_steps", type=int, default=10)
    add("--save_steps", type=int, default=500)
    add("--save_total_limit", type=int, default=3)
    add("--resume_from_checkpoint", help="a folder, or auto: the newest in --output_dir, if any")
    return parser.parse_args(argv)


def join_ranks():
    """Join the process group; return (rank, world_size, device). Without torchrun: a group of one."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # CPU tensors too have a backend, so that counts and messages never wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **alone)
    return dist.get_rank(), dist.get_world_size(), device


def on_all_ranks(function, *args):
    """Call `function` on every rank; where one raises PipelineError all end, rank 0 with all messages."""
    result, problem = None, None
    try:
        result = function(*args)
    except PipelineError as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems) and dist.get_rank() > 0:
        sys.exit(1)  # rank 0 says it for all
    if any(problems):
        raise PipelineError("\n".join(dict.fromkeys(filter(None, problems))))
    return result


def open_inputs(args, device, rank):
    """Open and check all that a user can get wrong, cheapest first, before anything is loaded."""
    resumed = lora.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    entries = dataset.load_manifest(args.train_manifest)
    config, tokenizer = lora.open_base(args.base_ckpt)
    codec, fingerprint = lora.open_codec(args.audio_tokenizer, config)
    cache = args.code_cache or args.train_manifest.parent / "code_cache"
    for folder in (args.output_dir, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipelineError(f"--output_dir or --code_cache cannot be made: {error}") from None
    clips = dataset.find_clips(entries, cache, f"{fingerprint} {device.type}")
    # Clips of user and system turns are heard as codes, where collator and model take them, or by Whisper
    setting, encodes = args.return_audio_in_tokens, config.encode_audio_in_tokens
    follow = {"auto": encodes, "true": True, "false": False}[setting]
    heard = (follow and encodes) or config.encode_whisper_embed
    deaf = [(f"entry {i}", "its reference clip never reaches the model") for i, entry in enumerate(entries)
            if not heard and any(role != "assistant" for role, _, _ in dataset.clips_of(entry))]
    if setting != "false":
        dataset.refuse(f"encode_audio_in_tokens {encodes}, --return_audio_in_tokens {setting} (use auto, or "
                       "put references into assistant turns before start_index)", deaf)
    elif deaf and rank == 0:
        print(f"warning: {len(deaf)} entries train deaf: {deaf[0][0]}: {deaf[0][1]}", file=sys.stderr)
    whisper = lora.open_whisper(args.whisper_processor) if config.encode_whisper_embed else None
    collator = dataset.build_collator(config, whisper, follow)
    return entries, clips, codec, tokenizer, collator, resumed


def encode_missing(clips, codec, device, num_workers):
    """Encode the clips that the cache lacks, each on one rank. Collective."""
    rank, plan = dist.get_rank(), [None]
    if rank == 0:  # alone: the others, looking later, would find files that are being made
        missing = {name: os.path.getsize(name) if name == part["audio_url"] else len(name)  # or inline
                   for name, (file, _, part) in clips.items() if not file.exists()}
        plan = [dataset.deal(missing, missing, dist.get_world_size())]
    dist.broadcast_object_list(plan)
    if any(plan[0]):
        share = sorted((clips[name] for name in plan[0][rank]), key=lambda clip: clip[1])  # by entry
        codec = on_all_ranks(lora.load_codec, codec, device)
        on_all_ranks(dataset.encode_clips, share, codec, num_workers, rank == 0)
    unseen = [(f"entry {entry}", file) for file, entry, _ in clips.values() if not file.exists()]
    on_all_ranks(dataset.refuse, "codes unseen on this node; give a --code_cache that all share", unseen)


def loss_sums(outputs, batch, counts, text_head):
    """Summed cross entropy in float32, (1 + num_codebooks,): of the text labels, then of each codebook's.

    Position t of the logits predicts label t + 1: HiggsAudioModel.forward aligns them, unshifted. The first
    column of every audio segment is all -100, so the shift never crosses from one clip to the next.
    `counts` holds the number of text labels, known from the collation: selecting them then needs no sync.
    """
    labels = outputs.expanded_labels[:, 1:].flatten()  # (B * (T - 1),)
    selected = (labels != -100).nonzero_static(size=int(counts[0])).squeeze(1)  # (text labels,)
    hidden = outputs.logits[:, :-1].flatten(0, 1)[selected]  # (text labels, hidden): the head was taken out
    text_sum = F.cross_entropy(text_head(hidden).float(), labels[selected], reduction="sum")

    audio_logits = outputs.audio_logits[:-1]  # (A - 1, num_codebooks, codebook_size + 2), all clips in a row
    labels = batch["label_audio_ids"][:, 1:].T.reshape(audio_logits.shape[:2])  # (A - 1, num_codebooks)
    losses = F.cross_entropy(audio_logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return torch.cat([text_sum[None], losses.view(labels.shape).sum(0)])


def compute_gradients(model, text_head, micro_batches, device, bf16, counts):
    """Forward and backward over a step's micro-batches; the last one also averages the gradients over ranks.

    counts: the step's labels over all ranks, (1 + num_codebooks,). Returns this rank's loss sums, likewise,
    still on the device.
    """
    sums = torch.zeros(len(counts), device=device)
    weights = (dist.get_world_size() / counts.clamp(min=1)).to(device)  # DDP averages over ranks: undo it
    weights[1:] /= len(counts) - 1
    for i, (batch, own_counts) in enumerate(micro_batches):
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        with model.no_sync() if i < len(micro_batches) - 1 else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                outputs = model(**batch)
                losses = loss_sums(outputs, batch, own_counts, text_head)
            (losses * weights).sum().backward()
        sums += losses.detach()
    return sums


def rehearse(model, text_head, data, lengths, device, bf16):
    """Forward and synchronised backward of the largest micro-batch, no update: out-of-memory shows now.

    And DDP lays out its buckets anew after its first backward, which from three ranks on changes the order of
    sums: without this a resumed run would differ in the last bits.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = by_length[-64 if data.max_tokens else -data.batch_size :]
    batch, counts = data[longest, True][0]
    try:
        compute_gradients(model, text_head, [(batch, counts)], device, bf16, counts[:-3])
    except torch.OutOfMemoryError:
        raise PipelineError(
            f"out of memory on the largest micro-batch: {counts[-3]} samples, {counts[-1]} positions, with "
            f"entry {longest[-1]}; try --gradient_checkpointing, a smaller --batch_size or --max_tokens, "
            "--precision bf16, or leave that entry out") from None
    model.zero_grad()


def update(optimizer, schedule, parameters, max_grad_norm):
    """Clip and step; a gradient that is not finite is not applied. Returns its norm, still on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.found_inf = (~norm.isfinite()).float()  # as GradScaler does; fused AdamW reads it on the device
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm


def main(args):
    rank, world_size, device = join_ranks()
    entries, clips, codec, tokenizer, collator, resumed = on_all_ranks(open_inputs, args, device, rank)
    encode_missing(clips, codec, device, args.num_workers)
    lengths = on_all_ranks(dataset.measure, entries, clips, collator)
    data = dataset.StepDataset(entries, clips, tokenizer, collator, args.batch_size, args.max_tokens)
    samples_per_step = args.batch_size * args.grad_accum * world_size
    steps_per_epoch = -(-len(entries) // samples_per_step)
    total = args.max_steps or args.epochs * steps_per_epoch

    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    base = on_all_ranks(lora.load_base, args.base_ckpt, torch.bfloat16 if bf16 else torch.float32, device)
    model = lora.attach(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    text_head = lora.take_text_head(model)
    if args.gradient_checkpointing:
        lora.checkpoint_gradients(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * total), total)
    run = dict(base_ckpt=args.base_ckpt, lora_r=args.lora_r, lora_alpha=args.lora_alpha, seed=args.seed,
               entries=len(entries), samples_per_step=samples_per_step)
    first = on_all_ranks(lora.restore, resumed, model, optimizer, schedule, run) if resumed else 0
    for parameter in parameters:  # DDP itself would send the whole frozen base (init_sync)
        dist.broadcast(parameter.data, src=0)
    model = DistributedDataParallel(model.train(), broadcast_buffers=False, init_sync=False,
                                    gradient_as_bucket_view=True)
    rehearse(model, text_head, data, lengths, device, bf16)

    sampler = dataset.StepSampler(lengths, samples_per_step, args.seed, rank, world_size, range(first, total))
    loader = DataLoader(data, sampler=sampler, batch_size=None, num_workers=args.num_workers,
                        pin_memory=device.type == "cuda", worker_init_fn=dataset.ignore_signals)
    board = SummaryWriter(args.output_dir / "runs") if rank == 0 else None
    bar = tqdm(range(first + 1, total + 1), "training", initial=first, total=total, disable=rank > 0)
    batches, since, waited, seen = iter(loader), time.perf_counter(), 0.0, 0
    for step in bar:
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - asked
        counts = sum(counts for _, counts in micro_batches)  # (num_codebooks + 4,)
        dist.all_reduce(counts)
        seen += counts[-3:]
        # Dropout follows from these three alone: no generator state to save, and resuming is exact
        torch.manual_seed(hash((args.seed, step, rank)))  # of integers: the same in every process
        sums = compute_gradients(model, text_head, micro_batches, device, bf16, counts[:-3])
        norm = update(optimizer, schedule, parameters, args.max_grad_norm)
        if step % args.logging_steps == 0 or step == total:
            dist.all_reduce(sums)
            text_loss, *audio_losses = (sums.cpu() / counts[:-3].clamp(min=1)).tolist()  # CPU-GPU sync point
            audio_loss, took = sum(audio_losses) / len(audio_losses), time.perf_counter() - since
            samples, positions, padded = seen.tolist()
            peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024  # bytes
            metrics = {
                "epoch": step / steps_per_epoch, "loss": text_loss + audio_loss, "text_loss": text_loss,
                "audio_loss": audio_loss, "audio_loss_per_codebook": audio_losses,
                "lr": schedule.get_last_lr()[0], "grad_norm": norm.item(), "samples_per_s": samples / took,
                "tokens_per_s": positions / took, "padding": 1 - positions / padded,
                "data_wait": waited / took, "max_memory_gb": peak / 1e9}
            if rank == 0:
                with open(args.output_dir / "metrics.jsonl", "a") as stream:
                    stream.write(json.dumps({"step": step, **metrics}) + "\n")
                curves = metrics | {f"codebook_{k}": loss for k, loss in enumerate(audio_losses)}
                for name in curves.keys() - {"audio_loss_per_codebook"}:
                    board.add_scalar(name, curves[name], step)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            since, waited, seen = time.perf_counter(), 0.0, 0
        if step % args.save_steps == 0 and rank == 0:
            state = dict(run=run, step=step, optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
            lora.save_checkpoint(args.output_dir, model.module, state, args.save_total_limit)
    if rank == 0:
        lora.save(model.module, args.output_dir)
        print(f"done: {total} steps, the adapter is in {args.output_dir}")
    dist.barrier()


def leave():
    """At exit, whatever the reason: Python would send the workers SIGTERM, which they ignore, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forks, and tokenizers warns of each
    atexit.register(leave)
    try:
        main(parse_args())
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
