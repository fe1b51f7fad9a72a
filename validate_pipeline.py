"""Validation: prove the pipeline on this machine, look at your data, compare adapters.

python validate_pipeline.py               train a tiny random model, check it all: no GPU, no network
python validate_pipeline.py --keep DIR    the same; checkpoint, clips and manifest stay in DIR
python validate_pipeline.py --train_manifest M --base_ckpt B [any other option of trainer.py]
                                          preflight: what M holds, what is suspicious or too large
python validate_pipeline.py --train_manifest M --base_ckpt B --adapter O [O/checkpoint-N ...]
                                          losses of base and adapters, wav files of the first entry
"""

import argparse
import math
import sys
import time
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import lora
import trainer
from dataset import PipelineError
from tests import acceptance

FRAME_RATE = 25  # of the codec, 1/s
SAMPLE_RATE = 24_000  # of the codec, 1/s


def tell(name, text):
    """One line of the report."""
    print(f"{name:<11} {text}", flush=True)


def in_words(seconds):
    """A time in the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def split_clips(entry):
    """(its references, [(clips of a trained turn, the text it answers), ...])."""
    references, targets, said = [], [], ""
    for i, turn in enumerate(entry["messages"]):
        paths = [path for _, path in dataset.clips_of({"messages": [turn]})]
        text = " ".join(part["text"] for part in turn["content"] if "text" in part)
        if turn["role"] == "assistant" and i >= (entry.get("start_index") or 0):
            targets.append((paths, f"{said} {text}".strip()))
        else:
            references += paths
            said = text
    return references, targets


def describe_data(entries, frames):
    """Entries, clips and their total length."""
    masked = sum(1 for entry in entries if entry.get("start_index"))
    tell("entries", f"{len(entries):,} ({masked:,} with a start_index), {len(frames):,} distinct clips")
    references, targets = set(), set()
    for entry in entries:
        cited, answers = split_clips(entry)
        references.update(cited)
        for paths, _ in answers:
            targets.update(paths)
    for name, paths in (("references", references), ("targets", targets)):
        seconds = sum(frames[path] for path in paths) / FRAME_RATE
        tell(name, f"{in_words(seconds)} in {len(paths):,} distinct clips")


def describe_reference(data):
    """By which ways the first reference reaches the model."""
    cited = [i for i, entry in enumerate(data.entries) if split_clips(entry)[0]]
    if not cited:
        tell("reference", "there is none")
        return
    references, _ = split_clips(data.entries[cited[0]])
    roles = {role for role, path in dataset.clips_of(data.entries[cited[0]]) if path in references}
    ways = []
    if roles & {"user", "system"} and data.collator.return_audio_in_tokens:
        ways.append("as codes")
    if "assistant" in roles:
        ways.append("as an earlier reply")
    heard = "heard " + ", ".join(ways) if ways else "NOT heard"
    tell("reference", f"of entry {cited[0]} is {heard}")


def describe_target(data):
    """The first entry decoded back: what is given, and what is trained."""
    [(batch, counts)] = data[[0], True]
    ids, labels = batch["input_ids"][0], batch["label_ids"][0]  # (T,)
    start = (labels != -100).nonzero()[0, 0]
    answered = (labels != -100) | (ids == data.collator.audio_out_token_id)
    text, *codebooks = counts.labels.tolist()
    tell("entry 0", f"is given {data.tokenizer.decode(ids[:start])!r}")
    tell(
        "",
        f"and trained on {data.tokenizer.decode(ids[start:][answered[start:]])!r}: {text} labels of "
        f"text, {codebooks[0]} in each of {len(codebooks)} codebooks",
    )


def describe_lengths(lengths):
    """A histogram of the entries' positions."""
    counts, edges = np.histogram(lengths, bins=min(10, len(set(lengths))))
    for n, low, high in zip(counts, edges, edges[1:], strict=False):
        tell("positions", f"{low:>6,.0f} to {high:>6,.0f} {'#' * -(-40 * n // counts.max()):<40} {n:,}")


def describe_epoch(lengths, args, max_tokens, ranks, seconds_a_position):
    """Optimizer steps, padding and time of an epoch on so many GPUs like this device."""
    samples_per_step = args.batch_size * args.grad_accum * ranks
    steps = range(-(-len(lengths) // samples_per_step))
    padded = 0
    for shares in dataset.deal_steps(lengths, samples_per_step, args.seed, ranks, steps):
        for indices, _ in shares:
            samples = [(lengths[i], i) for i in indices]
            for micro_batch in dataset.cut(samples, args.batch_size, max_tokens):
                padded += len(micro_batch) * micro_batch[0][0]
    padding = max(0, 1 - sum(lengths) / padded)
    name = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
    tell(
        name,
        f"{len(steps):,} optimizer steps an epoch of {samples_per_step} samples; {padding:.1%} of "
        f"the positions are padding; {in_words(padded * seconds_a_position / ranks)} an epoch",
    )


def listen(path):
    """(seconds of silence at its end, share of clipped samples) of a clip."""
    wave = dataset.load_waveform(path, SAMPLE_RATE)
    end = 0
    if np.abs(wave).max() > 0.01:
        end = librosa.effects.trim(wave, top_db=40)[1][1]
    return float(len(wave) - end) / SAMPLE_RATE, float(np.mean(np.abs(wave) > 0.99))


def suspect_texts(entries, frames):
    """[(entry, what)]: text and clip do not suit, or a clip is its own reference."""
    found, rates = [], {}
    for i, entry in enumerate(entries):
        references, targets = split_clips(entry)
        spoken = [path for paths, _ in targets for path in paths]
        for path in sorted(set(references) & set(spoken)):
            found.append((f"entry {i}", f"{path} is both reference and target"))
        if spoken:
            characters = sum(len(text) for paths, text in targets if paths)
            rates[i] = characters / (sum(frames[path] for path in spoken) / FRAME_RATE)
    usual = np.median(list(rates.values())) if rates else 0
    for i, rate in rates.items():
        if not usual / 3 <= rate <= usual * 3:
            found.append(
                (
                    f"entry {i}",
                    f"its text has {rate:.1f} characters a second of its clip, {usual:.1f} are usual",
                )
            )
    return found


def suspect_clips(clips, num_workers):
    """[(clip, what)]: it ends in silence, or is clipped."""
    found = []
    heard = DataLoader(list(clips), batch_size=None, num_workers=num_workers, collate_fn=listen)
    for path, (silence, clipped) in zip(clips, tqdm(heard, "listening to the clips"), strict=True):
        if silence > 0.5:
            found.append((path, f"ends in {silence:.1f} s of silence"))
        if clipped > 1e-3:
            found.append((path, f"is clipped: {clipped:.1%} of it"))
    return found


def reset_peak_memory(device):
    """Forget the peak so far, which may be the codec's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux's way, see proc(5)


def try_largest(args, inputs, lengths, device):
    """Run the largest micro-batch; returns the seconds that a position takes."""
    model, text_head = lora.build_model(args, inputs.base, device)
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    tell("trainable", f"{sum(trainable):,} parameters")
    model = DistributedDataParallel(model)
    trainer.rehearse(args, model, text_head, inputs.data, lengths)  # lays out buckets
    reset_peak_memory(device)
    began = time.perf_counter()
    counts = trainer.rehearse(args, model, text_head, inputs.data, lengths)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = (time.perf_counter() - began) / 2  # it runs twice
    tell(
        "largest",
        f"micro-batch: {counts.samples} samples, {counts.padded_positions:,} positions with "
        f"padding; {took:.2f} s forward and backward, {lora.peak_memory() / 1e9:.2f} GB "
        "peak memory",
    )
    return took / counts.padded_positions


def preflight(args, device):
    """What trainer.py would do with the user's data, or refuse."""
    inputs = trainer.open_inputs(args, device)
    trainer.encode_missing(inputs, device)
    data = inputs.data
    lengths = dataset.measure(data)
    frames = {path: dataset.load_codes(file).shape[1] for path, file in data.clips.items()}
    describe_data(data.entries, frames)
    describe_target(data)
    describe_reference(data)
    describe_lengths(lengths)
    suspicious = suspect_texts(data.entries, frames) + suspect_clips(data.clips, args.num_workers)
    seconds_a_position = try_largest(args, inputs, lengths, device)
    for ranks in (1, 8):
        describe_epoch(lengths, args, data.max_tokens, ranks, seconds_a_position)
    if suspicious:
        print(f"worth a look, though all of it would train: {len(suspicious)}, the first of them")
        for where, what in suspicious[:20]:
            print(f"  {where}: {what}")
    print("ready for trainer.py with the same options")


def mean_losses(model, text_head, data):
    """Teacher-forced losses of all entries, a list: of text, audio, and each codebook."""
    sums, seen = 0, []
    with torch.no_grad():
        for batch, counts in data[range(len(data.entries)), True]:
            sums = sums + trainer.forward(model, text_head, batch, counts).cpu()
            seen.append(counts)
    text, *codebooks = (sums / dataset.add_up(seen).labels.clamp(min=1)).tolist()
    return [text, sum(codebooks) / len(codebooks), *codebooks]


def speak(args, inputs, device):
    """Write entry 0 as base and last adapter speak it, and its own target."""
    logger.disable("boson_multimodal")  # it tells each of its steps
    codec = dataset.load_codec(inputs.codec, device)
    engine = HiggsAudioServeEngine(
        str(inputs.base),
        str(inputs.codec),
        device=str(device),  # cuda:0: on "cuda" it captures graphs in config.json's dtype, not in this one
        torch_dtype=lora.base_dtype(args.precision, device),
    )
    engine.collator.return_audio_in_tokens = inputs.data.collator.return_audio_in_tokens
    turns = inputs.data.entries[0]["messages"]
    reply = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    limit = min(1024, 2 * inputs.data.sample(0)[0])  # twice prompt and target: babble ends there
    waves = {}
    for name in ("base", "adapter"):
        (args.output_dir / f"{name}.wav").unlink(missing_ok=True)  # of another adapter
        if name == "adapter":
            engine.model = lora.load_adapter(engine.model, args.adapter[-1])
        try:
            waves[name] = engine.generate({"messages": turns[:reply]}, limit, seed=args.seed).audio
        except (IndexError, RuntimeError) as error:  # upstream's, if none came out
            tell(name, f"emits no audio, upstream's engine says {error}")
    for _, path in dataset.clips_of({"messages": turns[reply:]}):
        codes = dataset.load_codes(inputs.data.clips[path])  # (num_codebooks, T)
        waves["target"] = codec.decode(torch.tensor(codes[None], dtype=torch.long))[0, 0]
    for name, wave in waves.items():
        soundfile.write(args.output_dir / f"{name}.wav", wave, SAMPLE_RATE)
        tell(name, f"{args.output_dir}/{name}.wav, {len(wave) / SAMPLE_RATE:.1f} s")


def draw(output_dir):
    """loss.png: losses, and each codebook's beside chance, over metrics.jsonl."""
    table = pd.read_json(output_dir / "metrics.jsonl", lines=True).set_index("step")
    codebooks = pd.DataFrame(table["audio_loss_per_codebook"].tolist(), index=table.index)
    axes = table[["text_loss", "audio_loss"]].join(codebooks).plot(figsize=(12, 6), ylim=(0, None))
    axes.axhline(math.log(1026), color="gray", linestyle=":")
    axes.figure.savefig(output_dir / "loss.png")


def compare(args, device):
    """Losses of base and adapters on the first 50 entries; wav files of the first."""
    inputs = trainer.open_inputs(args, device)
    data = inputs.data
    data.entries = data.entries[:50]
    used = {path for entry in data.entries for _, path in dataset.clips_of(entry)}
    data.clips = {path: file for path, file in data.clips.items() if path in used}
    trainer.encode_missing(inputs, device)
    base = lora.load_base(inputs.base, lora.base_dtype(args.precision, device), device)
    text_head = lora.take_text_head(base)
    losses = {"(base)": mean_losses(base, text_head, data)}
    for name in args.adapter:
        model = lora.load_adapter(base, name)
        losses[name] = mean_losses(model, text_head, data)
        model.unload()
    tell("losses", f"of {len(data.entries)} entries, teacher-forced: text, audio, codebooks 0 to 7")
    for name, values in losses.items():
        tell("", " ".join(f"{value:7.3f}" for value in values) + f"  {name}")
    totals = {name: sum(losses[name][:2]) for name in args.adapter}
    finite = {name: total for name, total in totals.items() if np.isfinite(total)}
    if not finite:
        raise PipelineError("no adapter has a finite loss; take an earlier checkpoint, lower --lr")
    tell("best", f"{min(finite, key=finite.get)}, by text and audio loss")
    del base, model  # the engine loads its own
    for folder in map(Path, args.adapter):
        if (folder / "metrics.jsonl").exists():
            draw(folder)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    speak(args, inputs, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new or empty, to leave everything in")
    parser.add_argument("--adapter", nargs="+", help="trainer.py's --output_dir, or checkpoints")
    own, options = parser.parse_known_args()
    if not options and not own.adapter:
        acceptance.accept(own.keep)
        return
    args = trainer.parse_args(["--output_dir=listen", *options])
    args.adapter = own.adapter
    device, _, _ = trainer.join_ranks()
    if args.adapter:
        compare(args, device)
    else:
        preflight(args, device)


if __name__ == "__main__":
    sys.excepthook = trainer.fail
    main()
    trainer.leave(0)
