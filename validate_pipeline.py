"""Validation: prove the pipeline on this machine, look at your data before you pay, compare adapters.

python validate_pipeline.py               train a tiny random model, check it all: no GPU, no network
python validate_pipeline.py --keep DIR    the same; checkpoint, clips and manifest stay in DIR
python validate_pipeline.py --train_manifest M --base_ckpt B [any other flag of trainer.py]
                                          preflight: what M holds, what is suspicious or too large
python validate_pipeline.py --train_manifest M --base_ckpt B --adapter O [O/checkpoint-N ...]
                                          losses of base and adapters on M, and a page to hear them
"""

import argparse
import html
import re
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import dataset
import lora
import trainer
from tests import acceptance

FRAME_RATE, SAMPLE_RATE = 25, 24_000  # of the codec, 1/s
COLUMNS = {"text", "reference", "target", "base"}  # of the page on which one listens, before the adapters'
# Traces of a bad file: lost characters, control characters, HTML, UTF-8 that was read as Latin-1
ODD_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]|&(#\w+|[a-z]\w+);|[\xc3\xd8\xd9][\x80-\xbf]")
REPLIES = {  # kinds of replies, and what an engine must do for them
    "clip first": "any engine speaks them",
    "text, then clip": "give an engine that speaks at once the text first, or it is silently wrong (README)",
    "text only": "train no voice",
}


def report(name: str, text) -> None:
    print(f"{name:<11} {text}", flush=True)


def split_clips(entry: dict) -> tuple[list[str], list[tuple[list[str], str, str, str]]]:
    """(paths of references, [(paths of a trained turn, the text before it, its own text, its kind), ...])."""
    references, targets, said = [], [], ""
    for i, turn in enumerate(entry["messages"]):
        paths = [path for _, path in dataset.clips_of({"messages": [turn]})]
        text = dataset.texts_of({"messages": [turn]})
        if turn["role"] == "assistant" and i >= (entry.get("start_index") or 0):
            kind = "text, then clip" if turn["content"][0]["type"] == "text" else "clip first"
            targets.append((paths, said, text, kind if paths else "text only"))
        else:
            references += paths
            said = text
    return references, targets


def describe_data(data: dataset.StepDataset, frames: dict[str, int]) -> None:
    """Report entries, clips and hours, the kinds of replies, and whether references are heard."""
    masked = sum(1 for entry in data.entries if entry.get("start_index"))
    report("entries", f"{len(data.entries):,} ({masked:,} with start_index), {len(frames):,} distinct clips")
    clips, kinds, heard = {"references": set(), "targets": set()}, dict.fromkeys(REPLIES, 0), set()
    for entry in data.entries:
        references, targets = split_clips(entry)
        clips["references"].update(references)
        heard |= {role for role, path in dataset.clips_of(entry) if path in references}
        for paths, _, _, kind in targets:
            clips["targets"].update(paths)
            kinds[kind] += 1
    for name, paths in clips.items():
        length = timedelta(seconds=sum(frames[path] for path in paths) // FRAME_RATE)
        report(name, f"{length} (h:mm:ss) in {len(paths):,} distinct clips")
    for kind, number in kinds.items():
        if number:
            report("replies", f"{number:,} of {kind}: {REPLIES[kind]}")
    unheard = heard - {"assistant"} and not data.collator.return_audio_in_tokens
    told = f"{'NOT heard' if unheard else 'heard'}, in turns of: {', '.join(sorted(heard))}"
    report("reference", told if heard else "there is none")


def describe_target(data: dataset.StepDataset) -> None:
    """Report the first entry decoded back: what is given, and what is trained."""
    [(batch, counts)] = data[[0]]
    ids, labels = batch["input_ids"][0], batch["label_ids"][0]  # (T,)
    start = (labels != -100).argmax()
    answered = (labels != -100) | (ids == data.collator.audio_out_token_id)
    report("entry 0", f"is given {data.tokenizer.decode(ids[:start])!r}")
    trained = data.tokenizer.decode(ids[start:][answered[start:]])
    report("", f"and trained on {trained!r}: {counts[0]} labels of text, {counts[1]} in each codebook")


def find_odd_texts(entries: list[dict], frames: dict[str, int]) -> list[tuple[str, str]]:
    """(entry, what) where a text does not suit its clip, or where a clip is its own reference."""
    found, rates = [], {}
    for i, entry in enumerate(entries):
        references, targets = split_clips(entry)
        spoken = [path for paths, *_ in targets for path in paths]
        for path in sorted(set(references) & set(spoken)):
            found.append((f"entry {i}", f"{path} is both reference and target"))
        if len(targets) > 1 and not entry.get("start_index"):
            found.append((f"entry {i}", f"trains {len(targets)} turns: start_index is not set"))
        if odd := ODD_TEXT.search(dataset.texts_of(entry)):
            found.append((f"entry {i}", f"its text has {odd[0]!r}, which looks like a fault of its file"))
        if spoken:
            characters = sum(len(f"{said} {text}".strip()) for paths, said, text, _ in targets if paths)
            rates[i] = characters / (sum(frames[path] for path in spoken) / FRAME_RATE)
    usual = np.median(list(rates.values())) if rates else 0
    for i, rate in rates.items():
        if not usual / 3 <= rate <= usual * 3:
            what = f"its text has {rate:.1f} characters a second of its clip, {usual:.1f} are usual"
            found.append((f"entry {i}", what))
    return found


def measure_clip(path: str) -> tuple[float, float]:
    """(seconds of silence at its start or end, share of clipped samples) of a clip."""
    wave, start, end = dataset.load_waveform(path, SAMPLE_RATE), 0, 0
    if np.abs(wave).max() > 0.01:
        start, end = librosa.effects.trim(wave, top_db=40)[1]
    return max(start, len(wave) - end) / SAMPLE_RATE, float(np.mean(np.abs(wave) > 0.99))


def find_odd_clips(clips: list[str], num_workers: int) -> list[tuple[str, str]]:
    """(clip, what) where it starts or ends in silence, or is clipped."""
    dataset.import_librosa()
    found, measured = [], dataset.in_workers(measure_clip, clips, num_workers)
    for path, (silence, clipped) in zip(clips, tqdm(measured, "checking clips", len(clips)), strict=True):
        if silence > 0.5:
            found.append((path, f"starts or ends in {silence:.1f} s of silence"))
        if clipped > 1e-3:
            found.append((path, f"is clipped: {clipped:.1%} of it"))
    return found


def time_largest(args, data, base: Path, lengths: list[int], device: torch.device) -> float:
    """Run the largest micro-batch, and report it. Returns the seconds that a padded position takes."""
    adapter = lora.build_model(args, base, device)
    trainable = [parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad]
    report("trainable", f"{sum(trainable):,} parameters")
    data.max_tokens = trainer.choose_max_tokens(args, adapter, {"step": 0}, device)
    model = DDP(trainer.LossModel(adapter), gradient_as_bucket_view=True)
    optimizer, _ = trainer.build_optimizer(adapter, args, 1, {"step": 0})
    batch, counts = trainer.run_largest(model, optimizer, data, lengths, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    trainer.compute_gradients(model, [(batch, counts)], torch.from_numpy(counts[:-2]), device).cpu()
    took = time.perf_counter() - began
    size = f"{len(batch['input_ids'])} samples, {counts[-1]:,} positions with padding"
    limit = f"max_tokens {data.max_tokens or 'none'}"
    cost = f"{took:.2f} s forward and backward on {device}, {trainer.peak_memory():.2f} GB peak memory"
    report("largest", f"micro-batch: {size}, of {limit}; {cost}")
    return took / counts[-1]


def preflight(args: argparse.Namespace, device: torch.device) -> None:
    """Report what a manifest holds, what is doubtful in it, what it costs. Raises trainer.py's UserErrors."""
    print(trainer.describe_device(args, device))
    data, base, codec, _ = trainer.open_inputs(args, device)
    trainer.encode_missing(data, codec, device, args.num_workers)
    lengths = dataset.estimate_lengths(data)
    frames = {path: dataset.load_codes(file).shape[1] for path, file in data.code_files.items()}
    describe_data(data, frames)
    describe_target(data)
    report("positions", f"{sum(lengths):,} an epoch, about; the longest entry has {max(lengths):,}")
    odd = find_odd_texts(data.entries, frames) + find_odd_clips(list(data.code_files), args.num_workers)
    seconds = sum(lengths) * time_largest(args, data, base, lengths, device)
    samples = args.batch_size * args.grad_accum
    for gpus in (1, 8):
        steps = f"{len(lengths) / samples / gpus:,.1f} optimizer steps an epoch of {samples * gpus} samples"
        took = f"about {timedelta(seconds=round(seconds / gpus))}, by the time of the largest micro-batch"
        report(f"{gpus} GPU(s)", f"like {device}: {steps}; {took}")
    if odd:
        print(f"worth a look, though all of it would train: {len(odd)}, the first of them")
        for where, what in odd[:20]:
            print(f"  {where}: {what}")
    print("ready for trainer.py with the same options")


def mean_losses(model, data: dataset.StepDataset, device: torch.device) -> dict[str, float]:
    """Teacher-forced losses of all entries, by name: text, audio, total, and each codebook's."""
    sums, counts = 0, 0
    with torch.no_grad():
        for batch, own_counts in data[range(len(data.entries))]:
            sums = sums + model(dataset.to_tensors(batch, device), int(own_counts[0])).cpu()
            counts = counts + own_counts[:-2]
    text, *codebooks = (sums / torch.from_numpy(counts).clamp(min=1)).tolist()
    audio = sum(codebooks) / len(codebooks)
    numbered = {f"codebook {k}": loss for k, loss in enumerate(codebooks)}
    return {"text": text, "audio": audio, "total": text + audio, **numbered}


def write_audio(args, data, run: dict, base: Path, codec: Path, adapters: dict, device) -> pd.DataFrame:
    """Let base and adapters speak the first three entries; a table of players, a row an entry."""
    dataset.hubert_revision()  # refuses a HuBERT with code, which the engine would run
    logger.disable("boson_multimodal")  # it tells each of its steps
    # The device is cuda:0: on "cuda" the engine would capture graphs, of the base and in config.json's dtype
    dtype = lora.base_dtype(args.precision, device)
    engine = HiggsAudioServeEngine(str(base), str(codec), device=str(device), torch_dtype=dtype)
    engine.collator.return_audio_in_tokens = data.collator.return_audio_in_tokens
    base_model, rows = engine.model, {}
    for name in ["reference", "target", "base", *adapters]:
        if name in adapters:
            engine.model = lora.load_adapter(base_model, adapters[name], run["base_ckpt"])
        for i, entry in enumerate(data.entries[:3]):
            turns = entry["messages"]
            reply = max(k for k, turn in enumerate(turns) if turn["role"] == "assistant")
            references, targets = split_clips(entry)
            recorded = {"reference": references[-1:], "target": targets[-1][0][:1]}
            row = rows.setdefault(f"entry {i}", {"text": html.escape(" ".join(targets[-1][1:3]))})
            wave, reason = None, "the entry has no clip"
            file = args.output_dir / f"{i}-{name}.wav"
            file.unlink(missing_ok=True)  # of an earlier comparison
            if name in recorded:
                for path in recorded[name]:
                    codes = torch.tensor(dataset.load_codes(data.code_files[path]))  # (num_codebooks, T)
                    wave = engine.audio_tokenizer.decode(codes[None].long())[0, 0]  # (samples,)
            else:
                limit = min(1024, 2 * data.load_sample(i)[0])  # babble ends at twice the length
                try:
                    wave = engine.generate({"messages": turns[:reply]}, limit, seed=args.seed).audio
                except torch.OutOfMemoryError:
                    raise
                except (IndexError, RuntimeError) as error:  # upstream's, where no audio came out
                    reason = error
            row[name], told = "no audio", f"no audio: {reason}"
            if wave is not None:
                soundfile.write(file, wave, SAMPLE_RATE)
                row[name] = f'<audio controls src="{quote(file.name)}"></audio>'
                told = f"{file}, {len(wave) / SAMPLE_RATE:.1f} s"
            report(name, f"entry {i}: {told}")
        engine.model = base_model if name not in adapters else engine.model.unload()
    return pd.DataFrame(rows).T


def compare(args: argparse.Namespace, names: list[str], device: torch.device) -> None:
    """Losses of base and adapters on the first 50 entries; what they sound like, in output_dir/index.html."""
    data, base, codec, run = trainer.open_inputs(args, device)
    data.entries = data.entries[:50]
    used = {path for entry in data.entries for _, path in dataset.clips_of(entry)}
    data.code_files = {path: file for path, file in data.code_files.items() if path in used}
    trainer.encode_missing(data, codec, device, args.num_workers)
    dataset.estimate_lengths(data)  # refuses codes of another base
    names = sorted(names, key=lambda name: int(re.search(r"\d*$", name)[0] or 0))
    adapters = {Path(name).resolve().name: name for name in names}
    if len(adapters) < len(names) or COLUMNS & adapters.keys():  # not unique, or taken
        adapters = {f"adapter-{name.strip('/').replace('/', '-')}": name for name in names}
    base_model = lora.load_base(base, lora.base_dtype(args.precision, device), device)
    model = trainer.LossModel(base_model)
    losses = {"base": mean_losses(model, data, device)}
    for name, folder in adapters.items():
        model.model = lora.load_adapter(base_model, folder, run["base_ckpt"])
        losses[name] = mean_losses(model, data, device)
        model.model.unload()
    table = pd.DataFrame(losses).T
    print(f"losses of {len(data.entries)} entries, teacher-forced:")
    print(table.to_string(float_format="{:.3f}".format))
    if len(data.entries) < 20:
        print("warning: under 20 held-out entries, differences can be chance")
    finite = table["total"].drop("base")[np.isfinite(table["total"].drop("base"))]
    if finite.empty:
        raise dataset.UserError("no adapter has a finite loss; take an earlier checkpoint, or lower --lr")
    report("smallest", f"loss: {adapters[finite.idxmin()]}; listen before you choose")
    if not finite.min() < table["total"]["base"]:
        print("warning: the base's own loss is smaller than each adapter's")
    del model, base_model  # the engine loads its own
    args.output_dir.mkdir(parents=True, exist_ok=True)
    players = write_audio(args, data, run, base, codec, adapters, device)
    heads = {name: f"{html.escape(name)}<br>loss {table['total'][name]:.3f}" for name in losses}
    pd.set_option("display.max_colwidth", None)  # it cuts long cells off
    page = players.rename(columns=heads).to_html(escape=False)
    (args.output_dir / "index.html").write_text(f'<meta charset="utf-8">\n{page}', encoding="utf-8")
    report("listen", f"open {args.output_dir}/index.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new or empty, to leave everything in")
    parser.add_argument("--adapter", nargs="+", help="trainer.py's --output_dir, or checkpoints")
    own, options = parser.parse_known_args()
    if not options and not own.adapter:
        return acceptance.accept(own.keep)
    args = trainer.parse_args(["--output_dir=listen", *options])

    def run():
        device = trainer.choose_device()
        trainer.join_ranks(device)
        return compare(args, own.adapter, device) if own.adapter else preflight(args, device)

    trainer.run_and_exit(run)


if __name__ == "__main__":
    main()
