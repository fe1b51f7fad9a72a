"""What the pipeline does on a GPU, in a table that grows a row at a time: under nine minutes on one H100.

    python -m tests.manual.on_gpu

Each row is `verdict  name: figure`. It has no verdict where there is no criterion, and `----` where it could
not be done; it then says why, and the others go on. Without a GPU all that can do so runs on the CPU, and the
tiny shape stands for the released one: so this is known to work on the day that a GPU comes.
"""

import functools
import gc
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

FOLDER = Path(tempfile.mkdtemp(prefix="on_gpu_"))
# The libraries read these once, when they are imported; acceptance.environment() would hide the GPU
os.environ |= {"HF_HOME": f"{FOLDER}/huggingface", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
os.environ["TQDM_DISABLE"] = "1"  # bars would tear the table

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine  # noqa: E402

import dataset  # noqa: E402
import lora  # noqa: E402
import trainer  # noqa: E402
from tests import acceptance  # noqa: E402
from tests.manual import benchmark  # noqa: E402
from tests.support import tiny_checkpoint  # noqa: E402
from tests.support.batches import plan_of  # noqa: E402
from tests.support.bounds import TINY, rounding_bound  # noqa: E402

CPU, FP32, BF16 = torch.device("cpu"), "--precision=fp32", "--precision=bf16"
FLOP = 4 * 2.8e9  # of a position: 4 for each parameter that it passes, of two FFNs one
CARD = 990e12  # FLOP/s of an H100 or H200 in bf16, as its maker says
INPUTS = [f"--train_manifest={FOLDER}/train.json", f"--base_ckpt={FOLDER}/model"]
INPUTS += [f"--audio_tokenizer={FOLDER}/codec"]
verdicts = Counter()


def need_gpu(device):
    if device.type == "cpu":
        raise dataset.UserError("no GPU")


def row(name, function, *args):
    """Print what function(*args) returns, (passed or None, figure), or in one line why it cannot."""
    began = time.perf_counter()
    try:
        passed, figure = function(*args)
        verdict = "" if passed is None else "pass" if passed else "FAIL"
    except (Exception, SystemExit) as error:  # in a report it is said, and the rest is measured
        # Of all that a program printed, the first line that names an error
        found = re.search(r"^(error|[\w.]*Error): .*$", str(error), re.MULTILINE)
        told = str(error) if isinstance(error, dataset.UserError) else f"{type(error).__name__}: {error}"
        verdict, figure = "----", found[0] if found else told[:300]
    verdicts[verdict] += 1
    took = time.perf_counter() - began
    print(f"{verdict:<4}  {name}: {' '.join(figure.split())}  [{took:.0f} s]", flush=True)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA never started


def train():
    """acceptance.train, in float32, on GPUs; where there is one, two micro-batches stand for two ranks."""
    ranks = 2 if torch.cuda.device_count() > 1 else 1
    flags = [*INPUTS, *acceptance.OVERFIT, FP32]
    step_21 = [*flags, f"--resume_from_checkpoint={FOLDER}/out/checkpoint-20", "--max_steps=21"]
    step_21 += ["--save_steps=21", "--max_grad_norm=1e9"]
    whole = [*flags, "--save_steps=20", f"--batch_size={4 // ranks}", f"--output_dir={FOLDER}/out"]
    one = [*step_21, "--batch_size=4", f"--output_dir={FOLDER}/one_rank"]
    two = [*step_21, "--batch_size=2", f"--grad_accum={2 // ranks}", f"--output_dir={FOLDER}/two_ranks"]
    for runs in ({ranks: [whole]}, {1: [one]}, {ranks: [two]}):
        acceptance.run(sys.executable, "-m", "tests.support.ranks", json.dumps(runs))
    stand = "two ranks" if ranks == 2 else "two micro-batches on one rank (there are no two GPUs)"
    return None, f"60 steps; for the row DDP scaling one more, also in {stand}"


@functools.cache
def open_lab(device, dtype):
    """acceptance.open_lab on `device`. Its checks name the CPU, and NumPy cannot read a GPU's memory."""

    def engine(*folders, **options):
        return HiggsAudioServeEngine(*folders, **options | {"device": str(device), "torch_dtype": dtype})

    def micro_batches(data, indices):
        return [
            (dataset.to_tensors(b, device), torch.from_numpy(n).to(device))
            for b, n in data[plan_of(data, indices)]
        ]

    def in_float64(outputs, batch, upstream=acceptance.loss_in_float64):
        names = "logits", "expanded_labels", "audio_logits"
        outputs = SimpleNamespace(**{name: getattr(outputs, name).cpu() for name in names})
        return upstream(outputs, {"label_audio_ids": batch["label_audio_ids"].cpu()})

    if acceptance.CPU is not device:  # then for the rest of this process
        acceptance.CPU, acceptance.micro_batches = device, micro_batches
        acceptance.loss_in_float64 = in_float64
    with patch.object(acceptance, "HiggsAudioServeEngine", engine):
        lab = acceptance.open_lab(FOLDER)
    load_codec = functools.partial(lora.load_codec, FOLDER / "codec", device)
    dataset.encode_missing(lab.data.code_files, load_codec, 0)  # where the training did not get that far
    return lab


def learn_in_bf16(device):
    """Train in bf16 under torchrun, as a user does; upstream's engine then speaks in bf16, too."""
    need_gpu(device)  # on a CPU it takes ten minutes
    flags = [*INPUTS, *acceptance.OVERFIT, BF16, "--batch_size=4", f"--output_dir={FOLDER}/bf16"]
    acceptance.run(*acceptance.TORCHRUN, "--standalone", "--nproc_per_node=1", "trainer.py", *flags)
    return acceptance.judge(*acceptance.answer_all(open_lab(device, torch.bfloat16), "bf16"))


def open_tiny(device, *flags):
    """(PEFT model, the same with its losses under DDP); A and B are drawn on the CPU, and neither is zero."""
    args = trainer.parse_args([*INPUTS, "--output_dir=none", "--lora_dropout=0", *flags])
    adapter, generator = lora.build_model(args, FOLDER / "model", device), torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapter, benchmark.distribute(trainer.LossModel(adapter))


def add_gradients(model, step, device):
    trainer.compute_gradients(model, step, torch.from_numpy(sum(n for _, n in step))[:-2], device)


@functools.cache
def gradient(codes, device, *flags):
    """The step's gradient on `device` of the three entries, encoded on `codes`: float64 on the CPU."""
    adapter, model = open_tiny(device, *flags)
    add_gradients(model, open_lab(codes, torch.float32).data[[[0], [1], [2]]], device)
    return torch.cat([p.grad.double().cpu().flatten() for p in adapter.parameters() if p.requires_grad])


def compare(expected, other, limited=True):
    """The difference of two gradients, each given by gradient's arguments, relative to the first's norm.

    Where it is limited it may be what float32 sums over the positions in another order make, through the
    layers, forward and backward. Two dtypes differ by more: that is told only.
    """
    if expected == other:
        raise dataset.UserError("no GPU")
    data = open_lab(expected[0], torch.float32).data
    limit = rounding_bound(sum(data.load_sample(i)[0] for i in range(3)), 2 * TINY["layers"])
    expected, other = gradient(*expected), gradient(*other)
    error = ((expected - other).norm() / expected.norm()).item()
    return error < limit if limited else None, f"differ by {error:.1e} (relative norm)"


def plant_nan(device):
    """With the embedding of a code of one entry NaN, so is the norm by which trainer.train skips."""
    data, (adapter, model) = open_lab(device, torch.float32).data, open_tiny(device)
    code = data.load_sample(0)[1].audio_ids_concat[0, -1].item()
    adapter.get_base_model().audio_codebook_embeddings.weight.data[code] = torch.nan
    add_gradients(model, data[[[0], [1], [2]]], device)
    norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0).item()
    return not np.isfinite(norm), f"the gradient's norm is {norm}; where it is not finite, no update is made"


def shape_of(device):
    return "released" if device.type == "cuda" else "tiny"


@functools.lru_cache(maxsize=1)
def random_model(device, *flags):
    """A model of random weights that are drawn on the device: no 11.5 GB are written to a disk and read."""
    args, drawn = trainer.parse_args(["--train_manifest=none", "--output_dir=none", *flags]), []

    def keep(model, folder):
        model.config.save_pretrained(folder)
        drawn.append(model.requires_grad_(False))

    with patch.object(lora.HiggsAudioModel, "save_pretrained", keep):
        data = benchmark.open_data(args, shape_of(device), FOLDER / "random", 64, device)
    with patch.object(lora, "load_base", lambda *_: drawn.pop()):
        adapter = lora.build_model(args, FOLDER / "random", device)
    model, lengths = trainer.LossModel(adapter), [data.load_sample(i)[0] for i in range(64)]
    return SimpleNamespace(args=args, adapter=adapter, model=model, data=data, lengths=lengths)


def fill(random, limit):
    """[(batch, counts)], one micro-batch of as many of the longest samples as `limit` positions hold."""
    order = sorted(range(64), key=random.lengths.__getitem__, reverse=True)
    chosen = order[: max(1, limit // random.lengths[order[0]])]
    return random.data[[chosen]]


@functools.cache
def matmul_rate(device):
    need_gpu(device)
    return benchmark.matmul_rate(device)


def pace(device, limit, *flags, cudnn=False, as_cut=False):
    """Forward and backward of one full micro-batch; `as_cut`: of 16 samples, as the trainer cuts them."""
    if cudnn:
        need_gpu(device)
    random = random_model(device, *flags)
    step = random.data[plan_of(random.data, range(16), limit)] if as_cut else fill(random, limit)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    random.model.zero_grad()
    runs = [benchmark.timed(lambda: add_gradients(random.model, step, device), device) for _ in range(4)]
    first, *later = [took for _, took, _ in runs]
    seconds, counts = statistics.median(later), sum(n for _, n in step)
    rate, above = counts[-2] / seconds, max(memory for *_, memory in runs) / 1e9
    figure = f"{rate:,.0f} positions/s; {counts[-1]:,} with padding in {len(step)} micro-batch(es) take "
    figure += f"{seconds:.3f} s (the first time {first:.3f}), {above:.2f} GB above the model"
    if device.type == "cuda":
        most, measured = torch.cuda.max_memory_allocated() / 1e9, matmul_rate(device)
        figure += f", {most:.1f} GB in all; MFU {FLOP * rate / CARD:.1%} of {CARD / 1e12:.0f} TFLOP/s, "
        figure += f"{FLOP * rate / measured:.1%} of the measured {measured / 1e12:.0f}"
    return None, figure


def run_largest(device):
    """Run the largest micro-batch that --max_tokens lets come, as the trainer does before its first step."""
    random = random_model(device)
    limit, before = random.args.max_tokens, benchmark.reset_memory(device)
    step = fill(random, limit)
    try:
        add_gradients(random.model, step, device)
    except torch.OutOfMemoryError:
        return False, f"{limit:,} do not fit beside {before / 1e9:.1f} GB of weights"
    [(_, counts)] = step
    if device.type == "cpu":
        return None, f"no GPU to fill; the largest micro-batch has {counts[-1]:,} positions"
    peak, total = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.mem_get_info()[1] / 1e9
    return (
        True,
        f"{limit:,}; the largest micro-batch, {counts[-1]:,} positions, takes {peak:.1f} of {total:.1f} GB",
    )


def count_waits(device, limit):
    """How often the host waits for the GPU in a micro-batch. Ours is one: the copy of the weights."""
    need_gpu(device)
    model, step = random_model(device).model, fill(random_model(device), limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            add_gradients(model, step, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    files = [Path(one.filename).resolve() for one in caught if "synchronizing CUDA" in str(one.message)]
    ours, names = sum(file.parent == acceptance.ROOT for file in files), Counter(file.name for file in files)
    return ours <= 1, f"{len(files)}, of them {ours} in our lines; {dict(names.most_common(5))}"


def count_kept(device, limit, *flags):
    """Bytes of the tensors that a forward pass keeps for the backward pass, without weights."""
    random = random_model(device, *flags)
    [(batch, counts)] = fill(random, limit)
    _, saved = benchmark.forward_saving(random.model, dataset.to_tensors(batch, device), counts)
    weights, config = {w.data_ptr() for w in random.model.parameters()}, random.adapter.config.text_config
    storages = [tensor.untyped_storage() for tensor in saved]
    kept = sum(s.nbytes() for s in storages if s.data_ptr() not in weights) / counts[-1]
    column = kept / config.num_hidden_layers / config.hidden_size
    return None, f"{kept / 1e6:.3f} MB a position: {column:.1f} bytes a layer and column"


def encode(device, workers):
    """The tiny checkpoint's codec on clips of 44.1 kHz; the released one, and its HuBERT, are larger."""
    seconds, number = (10, 24) if device.type == "cuda" else (2, 6)
    wave = tiny_checkpoint.speech_like(seconds, 1, 44_100)
    clips = [(str(FOLDER / f"{i}.wav"), FOLDER / f"{i}_{workers}.npy") for i in range(number)]
    for i, (path, _) in enumerate(clips):
        soundfile.write(path, np.roll(wave, 1000 * i), 44_100)
    began = time.perf_counter()
    dataset.encode_missing(dict(clips), lambda: lora.load_codec(FOLDER / "codec", device), workers)
    took = time.perf_counter() - began
    return None, f"{seconds * number / took:.1f} s of sound a second ({number} clips of {seconds} s)"


def main():
    began = time.perf_counter()
    warnings.simplefilter("ignore")
    device = trainer.start()
    row("this machine", lambda: (None, str(device)))
    tiny_checkpoint.make_everything(FOLDER)
    row("training", train)
    for name, check in acceptance.TABLE.items():
        row(name, lambda check=check: check(open_lab(device, torch.float32)))
    row("It learns in bf16", learn_in_bf16, device)
    here = device, device, FP32
    row("gradients, GPU and CPU in float32", compare, (device, CPU, FP32), here)
    row("gradients, bf16 and float32", compare, here, (device, device, BF16), False)
    row("gradients, with and without checkpointing", compare, here, (*here, "--gradient_checkpointing"))
    row("a NaN in one sample", plant_nan, device)

    shape, size = shape_of(device), 8192 if device.type == "cuda" else 1024
    row("matrix products in bf16", lambda: (None, f"{matmul_rate(device) / 1e12:.0f} TFLOP/s"))
    row(f"{shape}: the largest micro-batch", run_largest, device)
    row(f"{shape}: the host waits", count_waits, device, size)
    row(f"{shape}: kept for backward", count_kept, device, size // 2)
    row(f"{shape}: one sample", pace, device, 1)  # what a micro-batch costs, however small
    row(f"{shape}: 16 samples", functools.partial(pace, as_cut=True), device, size)
    other = size * 3 // 4  # positions of other lengths than before, for which cuDNN has no plan yet
    row(f"{shape}: {other}", pace, device, other)
    row(f"{shape}: {other}, cuDNN attention", functools.partial(pace, cudnn=True), device, other)
    for flags in ([], ["--lora_dropout=0"], ["--gradient_checkpointing"]):
        row(" ".join([f"{shape}: {size}", *flags]), pace, device, size, *flags)
        row(" ".join([f"{shape}: {2 * size}", *flags]), pace, device, 2 * size, *flags)
    row(f"{shape}: kept, --gradient_checkpointing", count_kept, device, size // 2, *flags)
    random_model.cache_clear()
    for workers in (0, 2):
        row(f"encoding, decoded in {workers} workers", encode, device, workers)
    shutil.rmtree(FOLDER)
    counts = f"{verdicts['pass']} pass, {verdicts['FAIL']} FAIL, {verdicts['----']} could not be done"
    print(f"{counts}; {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    trainer.run_and_exit(main)
