"""The trainer's step against the obvious loop: same samples, same codes, same update, alternating, medians.

    python tests/manual/benchmark.py [--shape tiny|medium|released] [--json] [--repetitions 3] [OPTIONS]
    torchrun --nproc_per_node=2 tests/manual/benchmark.py ...  what the ranks' own work adds, no reference
    python tests/manual/benchmark.py --count [--gradient_checkpointing]
                                    counts what a position of the released shape keeps for the backward pass

reference: micro-batches of batch_size in file order, text logits at every position in float32, PEFT as it is.
ours: trainer.LossModel and trainer.compute_gradients, on a step that StepDataset has cut in a worker.
Memory is what a step takes above the loaded model: peak RSS on a CPU, the allocator's peak on a GPU.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import lora  # noqa: E402
import trainer  # noqa: E402
from tests.support import tiny_checkpoint  # noqa: E402
from tests.support.batches import micro_batches, plan_of  # noqa: E402

SHAPES = {"tiny": {}, "medium": dict(hidden=512, layers=8, vocab_size=128_256), "released": None}


def make_checkpoint(folder, shape, device, layers=28):
    """A random checkpoint of the shape, with the tiny text tokenizer; drawn on `device`, bf16 if released."""
    tokenizer = tiny_checkpoint.make_tokenizer(folder)
    config = tiny_checkpoint.make_config(tokenizer, **(SHAPES[shape] or {}))
    if shape == "released":
        settings = tiny_checkpoint.released_config().to_dict()
        settings["text_config"]["num_hidden_layers"] = layers
        settings["audio_dual_ffn_layers"] = list(range(layers))
        special = (
            "audio_in_token_idx",
            "audio_out_token_idx",
            "audio_out_bos_token_id",
            "audio_eos_token_id",
            "pad_token_id",
        )
        config = lora.HiggsAudioConfig(**{**settings, **{name: getattr(config, name) for name in special}})
    torch.set_default_dtype(torch.bfloat16 if shape == "released" else torch.float32)
    with device:
        model = lora.HiggsAudioModel(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def make_samples(folder, count, seed=0):
    """(entries, clips) as find_clips gives them: references of 3 to 8 s, targets of 2 to 16 s, mean 10 s."""
    rng, clips, entries = np.random.default_rng(seed), {}, []
    for i in range(count):
        for kind, seconds in (("reference", rng.uniform(3, 8)), ("target", rng.triangular(2, 12, 16))):
            name, file = f"{kind}{i}", folder / f"{kind}{i}.npy"
            np.save(file, rng.integers(0, 1024, (8, round(25 * seconds))).astype(np.int16))
            clips[name] = file
        text = 2 * tiny_checkpoint.TEXTS[0] * int(rng.integers(2, 5))
        entries.append(tiny_checkpoint.voice_cloning_entry(text, f"reference{i}", f"target{i}"))
    entries = dataset.MANIFEST.validate_json(json.dumps(entries))
    for entry in entries:
        dataset.complete_in_place(entry, "")  # makes contents lists; that the clips have no file is right
    return entries, clips


def reference_gradients(model, micro_batches, counts):
    """The obvious loop: upstream's forward as it is, and cross entropy over everything."""
    device, sums = next(model.parameters()).device, 0.0
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    for i, (batch, _) in enumerate(micro_batches):
        batch = dataset.to_tensors(batch, device)
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                outputs = model(**batch)
                text = F.cross_entropy(
                    outputs.logits[:, :-1].float().flatten(0, 1),
                    outputs.expanded_labels[:, 1:].flatten(),
                    reduction="sum",
                )
                audio = torch.stack(
                    [
                        F.cross_entropy(outputs.audio_logits[:-1, k].float(), labels[1:], reduction="sum")
                        for k, labels in enumerate(batch["label_audio_ids"])
                    ]
                )
            weights = (dist.get_world_size() / counts).to(device)
            loss = text * weights[0] + (audio * weights[1:]).mean()
            loss.backward()
        sums += loss.item()
    return sums / dist.get_world_size()  # this rank's share of the step's loss


def peak_memory(device):
    """Bytes at the peak since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def reset_memory(device):
    """Start a new peak; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else pages that were freed count as in use
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return peak_memory(device)


def timed(function, device):
    """(result, seconds of the slowest rank, bytes above what was in use)."""
    before = reset_memory(device)
    dist.barrier()
    began = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took, peak = torch.tensor(time.perf_counter() - began), peak_memory(device) - before
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return result, took.item(), peak


def where_it_goes(step, rank_r, vocab, device):
    """Shares of a step's time by what the profiler sees: operators, told apart by the shapes they get."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    shares = dict.fromkeys(
        ["text head", "LoRA", "base layers", "attention", "loss", "optimizer", "other"], 0.0
    )
    for event in profile.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time is the operator's that launched it, too
        sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        kind = (
            "attention"
            if "attention" in event.key
            else "optimizer"
            if "adamw" in event.key
            else "loss"
            if "softmax" in event.key or "nll" in event.key
            else "text head"
            if product and vocab in sizes
            else "LoRA"
            if product and rank_r in sizes
            else "base layers"
            if product
            else "other"
        )
        shares[kind] += spent
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def matmul_rate(device):
    """FLOP/s of large bf16 products: what MFU is measured against."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(20):
        _, took, _ = timed(lambda: a @ a, device)
        times.append(took)
    return 2 * 8192**3 / statistics.median(times)


def imbalance(args, ranks=8):
    """The longest over the mean load of the ranks, less 1: mean over 100 steps of 16 samples a rank."""
    rng = np.random.default_rng(1)
    lengths = 25 * (rng.triangular(2, 12, 16, 12_800) + rng.uniform(3, 8, 12_800)) + 120
    lengths, size = lengths.astype(int).tolist(), 16 * ranks
    steps = [
        sorted(samples.tolist(), key=lengths.__getitem__)[::-1]
        for samples in rng.permutation(12_800).reshape(100, size)
    ]
    shares = [dataset.split_evenly(samples, lengths, ranks) for samples in steps]
    loads = np.array([[sum(lengths[i] for i in share) for share in step] for step in shares])
    return float((loads.max(1) / loads.mean(1)).mean() - 1)


def open_data(args, shape, folder, count, device, layers=28):
    """StepDataset of `count` samples, for a new checkpoint of the shape in `folder`, which becomes args'."""
    make_checkpoint(folder, shape, device, layers)
    args.base_ckpt = str(folder)
    config, tokenizer = lora.open_base(folder)
    return dataset.StepDataset(
        *make_samples(folder, count),
        tokenizer,
        dataset.build_collator([], config),
    )


def forward_saving(model, batch, counts):
    """(losses, the tensors that a forward pass keeps for the backward pass, one of each storage)."""
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # alive, or its address would come again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = model(batch)
    return losses, saved.values()


def count_saved(args, folder):
    """{figure: value}: bytes of saved tensors, without weights, from a model of one layer and of two."""
    args.precision, totals, cpu = "bf16", [], torch.device("cpu")
    for layers in (1, 2):
        data = open_data(args, "released", folder / str(layers), args.batch_size, cpu, layers)
        [(batch, counts)] = micro_batches(data, range(args.batch_size))
        model = trainer.LossModel(lora.build_model(args, folder / str(layers), cpu))
        _, saved = forward_saving(model, batch, counts)
        weights = {weight.data_ptr() for weight in model.parameters()}
        kept = [
            storage
            for storage in (tensor.untyped_storage() for tensor in saved)
            if storage.data_ptr() not in weights
        ]
        totals.append(sum(storage.nbytes() for storage in kept) / counts[-1].item())
    layer = totals[1] - totals[0]
    return {
        "a position, counted": {"bytes a layer": layer, "MB in 28 layers": (totals[0] + 27 * layer) / 1e6}
    }


def prepare(args, shape, folder, device):
    """(StepDataset, this rank's samples of a step, and its micro-batches in file order)."""
    count, rank = args.batch_size * args.grad_accum, dist.get_rank()
    data = open_data(args, shape, folder, count * dist.get_world_size(), device)
    mine = list(range(rank * count, (rank + 1) * count))
    in_order = [mine[i : i + args.batch_size] for i in range(0, count, args.batch_size)]
    return data, mine, data[in_order]


def distribute(model):
    """`model` under DDP, as in trainer.train."""
    return DistributedDataParallel(
        model, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True
    )


def update(model, optimizer, schedule, max_grad_norm):
    """Clip and apply the gradient, as in trainer.train; returns its norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if norm.isfinite():
        optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm.item()


def our_steps(args, data, mine, device, waits):
    """(a step as trainer.train takes it, what of it is not forward and backward, the text head's width)."""
    adapter = lora.build_model(args, Path(args.base_ckpt), device)
    optimizer, schedule = trainer.build_optimizer(adapter, args, 10**6, {"step": 0})
    lengths = [data.load_sample(i)[0] for i in range(len(data.entries))]
    model, _, _ = trainer.wrap_in_ddp(adapter, data, lengths, args, device)
    plan = plan_of(data, mine, args.max_tokens)
    steps = iter(dataset.in_workers(lambda step: data[plan], range(1000), args.num_workers))
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    gradient = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)

    def step():
        began = time.perf_counter()
        micro_batches = next(steps)
        waits.append(time.perf_counter() - began)
        counts = torch.tensor(sum(counts for _, counts in micro_batches))
        dist.all_reduce(counts)
        sums = trainer.compute_gradients(model, micro_batches, counts[:-2], device)
        update(adapter, optimizer, schedule, args.max_grad_norm)
        dist.all_reduce(sums)  # from here on in logging steps alone
        losses = sums.cpu() / counts[:-2]
        return (losses[0] + losses[1:].mean()).item(), counts

    def beside():
        for tensor in (torch.zeros(12), gradient, torch.zeros(9, device=device)):
            dist.all_reduce(tensor)  # of counts and the wish to stop, the gradient, losses
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return update(adapter, optimizer, schedule, args.max_grad_norm)

    return step, beside, model.module.text_head.out_features


def reference_step(args, counts, obvious, device):
    """The obvious loop's optimizer step, on a model of its own."""
    base = lora.load_base(Path(args.base_ckpt), lora.base_dtype(args.precision, device), device)
    plain = lora.attach_lora(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed).train()
    optimizer, schedule = trainer.build_optimizer(plain, args, 10**6, {"step": 0})
    model = distribute(plain)

    def step():
        loss = reference_gradients(model, obvious, counts[:-2])
        update(plain, optimizer, schedule, args.max_grad_norm)
        return loss, counts

    return step


def summary(runs, num_samples):
    """Figures of one way's runs [((loss, counts), seconds, bytes)]."""
    (loss, counts), _, _ = runs[0]
    seconds = statistics.median(took for _, took, _ in runs)
    return {
        "ms per step": 1e3 * seconds,
        "slowest": 1e3 * max(took for _, took, _ in runs),
        "samples/s": num_samples / seconds,
        "positions/s": counts[-2].item() / seconds,
        "padding": 1 - (counts[-2] / counts[-1]).item(),
        "first loss": loss,
        "memory above the model, GB": max(memory for *_, memory in runs) / 1e9,
    }


def measure(args, shape, repetitions, folder):
    """{way: {figure: value}} of one optimizer step; ours and, on one rank, the reference, alternating."""
    device = trainer.start()
    world_size = dist.get_world_size()
    data, mine, obvious = prepare(args, shape, folder, device)
    waits = []
    step, beside, vocab = our_steps(args, data, mine, device, waits)
    ways = {"ours": step, "beside": beside}
    if world_size == 1:
        ways["reference"] = reference_step(args, torch.tensor(sum(c for _, c in obvious)), obvious, device)
    runs = {name: [] for name in ways}
    for i in range(repetitions + 1):  # the first lays out buckets and caches
        for name, function in ways.items():
            run = timed(function, device)
            print(f"{i}: {name} took {run[1]:.2f} s", file=sys.stderr)
            runs[name] += [run] if i else []
    figures = {"ours": summary(runs["ours"], len(mine) * world_size)}
    took = statistics.median(took for _, took, _ in runs["beside"])
    figures["ours"]["beside forward and backward"] = took / figures["ours"]["ms per step"] * 1e3
    figures["ours"]["data wait"] = statistics.median(waits[1:]) / figures["ours"]["ms per step"] * 1e3
    figures["ours"]["imbalance of 8 ranks"] = imbalance(args)
    if "reference" in ways:
        figures["reference"] = summary(runs["reference"], len(mine))
        figures["ours over reference"] = {
            name: figures["ours"][name] / figures["reference"][name]
            for name in ("ms per step", "memory above the model, GB")
        }
    if device.type == "cuda" and shape == "released":
        rate = matmul_rate(device)  # 4 FLOP a parameter and position: forward, backward to the activations
        for name in figures.keys() & ways.keys():
            figures[name]["MFU"] = 4 * 2.8e9 * figures[name]["positions/s"] / world_size / rate
    for name in figures.keys() & ways.keys():
        shares = where_it_goes(ways[name], args.lora_r, vocab, device)
        figures[f"where the time goes, {name}"] = shares
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--repetitions", type=int, default=3)
    own, options = parser.parse_known_args()
    args = trainer.parse_args(
        ["--train_manifest=none", "--output_dir=none", "--lora_dropout=0", "--grad_accum=4", *options]
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        figures = (
            count_saved(args, folder) if own.count else measure(args, own.shape, own.repetitions, folder)
        )
    if os.environ.get("RANK", "0") != "0":
        return
    for name, values in () if own.json else figures.items():
        print(name, *(f"    {key:<30} {value:>12,.3f}" for key, value in values.items()), sep="\n")
    if own.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    trainer.run_and_exit(main)
