"""Validation: prove the pipeline on this machine, look at your data before you pay, compare adapters.

python validate_pipeline.py [--keep DIR]         train a tiny random model, check it all; leave it in DIR
python validate_pipeline.py FLAGS                preflight for trainer.py's FLAGS (on a CPU, 4 s a clip)
python validate_pipeline.py FLAGS --adapter O... losses of base and adapters, and a page to hear them
"""

import argparse
import math
import re
import time
from datetime import date, timedelta
from html import escape
from pathlib import Path
from urllib.parse import quote

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from boson_multimodal.data_types import ChatMLSample, Message
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from tqdm import tqdm

import dataset
import lora
import trainer
from tests import acceptance

FRAME_RATE, SAMPLE_RATE = 25, 24_000  # of the codec, 1/s
COLUMNS = ["target", "reference", "base"]  # of the page on which one listens; then come the adapters
ODD_LETTER = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]"  # lost, or control
ODD_TEXT = re.compile(ODD_LETTER + r"|&(#\w+|[a-z]\w+);|[\xc3\xd8\xd9][\x80-\xbf]")  # HTML, UTF-8 as Latin-1
PRESENTATION_FORM = re.compile(r"[\ufb50-\ufd3d\ufd50-\ufdfc\ufe70-\ufefc]")  # without ornate brackets
REPLIES = {  # kinds of replies, and what an engine must do for them
    "clip first": "any engine speaks them",
    "text, then clip": "give an engine that speaks at once the text first, or it is silently wrong (README)",
    "text only": "train no voice",
}
PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>%s</title><style>
body { font-family: sans-serif } p { white-space: pre-line } audio { width: 11em; display: block }
table { border-spacing: 0 } th { text-align: left } td { vertical-align: top }
th, td { border: 1px solid silver; padding: 0.4em; background: white; min-width: 11em }
tr > :nth-child(-n + 2) { position: sticky; left: 13em; z-index: 1 }
tr > :nth-child(1) { left: 0; box-sizing: border-box; min-width: 13em; max-width: 13em }
</style><h1>%s</h1><p>%s</p>%s"""  # text and target, the first two columns, stay in view


def report(name: str, text) -> None:
    print(f"{name:<11} {text}", flush=True)


def text_of(message: Message) -> str:
    """A turn's texts, with blanks between."""
    return " ".join(part.text for part in message.content if part.type == "text")


def split_clips(entry: ChatMLSample) -> tuple[list[str], list[tuple[list[str], str, str]]]:
    """(paths of references, [(paths of a trained turn, text before it and its own, its kind), ...])."""
    references, targets, said = [], [], ""
    for i, message in enumerate(entry.messages):
        paths = [part.audio_url for part in message.content if part.type == "audio"]
        if message.role == "assistant" and i >= (entry.start_index or 0):
            kind = "text, then clip" if message.content[0].type == "text" else "clip first"
            words = f"{said} {text_of(message)}".strip()
            targets.append((paths, words, kind if paths else "text only"))
        else:
            references += paths
            said = text_of(message)
    return references, targets


def describe_data(data: dataset.StepDataset, frames: dict[str, int]) -> None:
    """Report what the entries hold, and the first one decoded back: what is given, and what is trained."""
    masked = sum(bool(entry.start_index) for entry in data.entries)
    report("entries", f"{len(data.entries):,} ({masked:,} with start_index), {len(frames):,} distinct clips")
    split = [split_clips(entry) for entry in data.entries]
    references = {path for paths, _ in split for path in paths}
    targets = {path for _, turns in split for paths, *_ in turns for path in paths}
    for name, paths in (("references", references), ("targets", targets)):
        length = timedelta(seconds=sum(frames[path] for path in paths) // FRAME_RATE)
        report(name, f"{length} (h:mm:ss) in {len(paths):,} distinct clips")
    kinds = pd.Series([kind for _, turns in split for *_, kind in turns])
    for kind, number in kinds.value_counts().items():
        report("replies", f"{number:,} of {kind}: {REPLIES[kind]}")
    batch, counts = data[[[0]]][0]
    ids = batch["input_ids"][0]  # (T,)
    labels = batch["label_ids"][0]  # (T,)
    report("entry 0", f"is given {data.tokenizer.decode(ids[: (labels != -100).argmax()])!r}")
    trained = data.tokenizer.decode(labels[labels != -100])
    report("", f"and trained on {trained!r}: {counts[0]} labels of text, {counts[1]} in each codebook")


def find_odd_texts(entries: list[ChatMLSample], frames: dict[str, int]) -> list[str]:
    """What is odd, by entry: a text that does not suit its clip, or a clip that is its own reference."""
    found, rates = [], {}
    for i, entry in enumerate(entries):
        references, targets = split_clips(entry)
        spoken = [path for paths, *_ in targets for path in paths]
        for path in sorted(set(references) & set(spoken)):
            found.append(f"  entry {i}: {path} is both reference and target")
        if len(targets) > 1 and not entry.start_index:
            found.append(f"  entry {i}: trains {len(targets)} turns: start_index is not set")
        text = " ".join(map(text_of, entry.messages))
        if odd := ODD_TEXT.search(text):
            found.append(f"  entry {i}: its text has {odd[0]!r}, which looks like a fault of its file")
        if odd := PRESENTATION_FORM.search(text):
            what = f"{odd[0]!r}, a form as PDFs have: replace it with unicodedata.normalize('NFKC', text)"
            found.append(f"  entry {i}: its text has {what}")
        if spoken:
            characters = sum(len(words) for paths, words, _ in targets if paths)
            seconds = sum(frames[path] for path in spoken) / FRAME_RATE
            rates[i] = characters / seconds
    rates = pd.Series(rates, dtype=float)
    usual = rates.median()
    for i, rate in rates[(rates < usual / 3) | (rates > usual * 3)].items():
        found.append(f"  entry {i}: its text has {rate:.1f} characters a second of its clip, not {usual:.1f}")
    return found


def find_odd_sound(path: str) -> list[str]:
    """What is odd in a clip: it starts or ends in silence, or is clipped."""
    wave, found = dataset.load_waveform(path, SAMPLE_RATE), []
    start, end = librosa.effects.trim(wave, top_db=40, ref=lambda volume: max(volume.max(), 0.01))[1]
    silence = max(start, len(wave) - end) / SAMPLE_RATE
    clipped = np.mean(np.abs(wave) > 0.99)
    if silence > 0.5:
        found.append(f"  {path}: starts or ends in {silence:.1f} s of silence")
    if clipped > 1e-3:
        found.append(f"  {path}: is clipped: {clipped:.1%} of it")
    return found


def time_largest(args, data, base: Path, lengths: list[int], device: torch.device) -> float:
    """Run the largest micro-batch, and report it. Returns the seconds that a padded position takes."""
    adapter = lora.build_model(args, base, device)
    report("trainable", f"{adapter.get_nb_trainable_parameters()[0]:,} parameters")
    model, batch, counts = trainer.wrap_in_ddp(adapter, data, lengths, args, device)
    for _ in range(2):  # the second is timed, which waits for nothing that a GPU still has to do
        began = time.perf_counter()
        trainer.compute_gradients(model, [(batch, counts)], torch.from_numpy(counts[:-2]), device).cpu()
    took = time.perf_counter() - began
    size = f"{len(batch['input_ids'])} samples, {counts[-1]:,} positions with padding"
    report(
        "largest", f"micro-batch: {size}, of max_tokens {args.max_tokens}; {took:.2f} s forward and backward"
    )
    report("", f"on {device}, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory at most")
    return took / counts[-1]


def preflight(args: argparse.Namespace, device: torch.device) -> None:
    """Report what a manifest holds, what is doubtful in it, what it costs. Raises trainer.py's UserErrors."""
    data, base, codec, settings = trainer.open_inputs(args, device)
    report("device", f"{device}, base in {settings['precision']}")
    dataset.encode_missing(data.code_files, lambda: lora.load_codec(codec, device), args.num_workers)
    lengths = dataset.measure_lengths(data, args.num_workers)
    frames = {path: np.load(file, mmap_mode="r").shape[1] for path, file in data.code_files.items()}
    describe_data(data, frames)
    longest = f"the longest entry, {np.argmax(lengths)}, has {max(lengths):,}"
    report("positions", f"{sum(lengths):,} an epoch; {longest}")
    sounds = dataset.in_workers(find_odd_sound, list(frames), args.num_workers)
    odd = sum(tqdm(sounds, "checking clips", len(frames)), find_odd_texts(data.entries, frames))
    # Told before anything large is run: what is odd is often too large, too
    print(f"worth a look, though all of it would train: {len(odd)}", *odd[:20], sep="\n")
    seconds = sum(lengths) * time_largest(args, data, base, lengths, device)
    for gpus in (1, 8):
        samples = args.batch_size * args.grad_accum * gpus
        total = args.max_steps or math.ceil(args.epochs * len(lengths) / samples)
        steps = f"{total:,} steps in all, {len(lengths) / samples:,.1f} an epoch of {samples} samples"
        report(f"{gpus} GPU(s)", f"{steps}, about {timedelta(seconds=round(seconds / gpus))} an epoch")
    report("", "times by the largest micro-batch; under a few hundred steps teach little (not measured)")
    print("ready for trainer.py with the same options")


def mean_losses(model, data: dataset.StepDataset, device: torch.device) -> dict[str, float]:
    """Teacher-forced losses of all entries, by name: text, audio, total, and each codebook's."""
    plan = [[i] for i in range(len(data.entries))]
    batches = data[plan]
    with torch.no_grad():
        sums = sum(model(dataset.to_tensors(batch, device)).cpu() for batch, _ in batches)
    counts = torch.from_numpy(sum(counts for _, counts in batches)[:-2])
    text, *codebooks = (sums / counts.clamp(min=1)).tolist()
    audio = sum(codebooks) / len(codebooks)
    numbered = {f"codebook {k}": loss for k, loss in enumerate(codebooks)}
    return {"text": text, "audio": audio, "total": text + audio, **numbered}


def hear(engine: HiggsAudioServeEngine, data, i: int, column: str, seed: int) -> tuple:
    """(samples or None, why there are none): entry i's clip of that column, or what the model says."""
    messages, (references, targets) = data.entries[i].messages, split_clips(data.entries[i])
    if column in ("target", "reference"):
        for path in targets[-1][0][:1] if column == "target" else references[-1:]:
            codes = torch.from_numpy(np.load(data.code_files[path]))  # (num_codebooks, T)
            return engine.audio_tokenizer.decode(codes[None].long())[0, 0], None
        return None, "no audio: the entry has no clip"
    reply = max(k for k, message in enumerate(messages) if message.role == "assistant")
    limit = min(1024, 2 * data.load_sample(i)[0])  # babble ends at twice the length
    try:
        return engine.generate(ChatMLSample(messages[:reply]), limit, seed=seed).audio, None
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError):  # upstream takes the first of no clips, or decodes too few codes
        return None, "no audio: the model made no sound"


def write_audio(args, data, settings: dict, base: Path, codec: Path, adapters: dict, device) -> pd.DataFrame:
    """Let base and adapters speak the first three entries; a table of players, a row an entry."""
    lora.load_codec(codec, "cpu")  # refuses a HuBERT with code, which the engine would run
    logger.disable("boson_multimodal")  # it tells each of its steps
    # The device is cuda:0: on "cuda" the engine would capture graphs, of the base and in config.json's dtype
    dtype = lora.base_dtype(args.precision, device)
    engine = HiggsAudioServeEngine(str(base), str(codec), device=str(device), torch_dtype=dtype)
    engine.collator.return_audio_in_tokens = data.collator.return_audio_in_tokens
    base_model = engine.model
    texts = [escape(split_clips(entry)[1][-1][1]) for entry in data.entries[:3]]
    table = pd.DataFrame({"text": [f'<div dir="auto">{text}</div>' for text in texts]})
    for name in [*COLUMNS, *adapters]:
        if name in adapters:
            engine.model, _ = lora.load_adapter(base_model, adapters[name], settings["base_fingerprint"])
        for i in table.index:
            wave, told = hear(engine, data, i, name, args.seed)
            table.loc[i, name] = told
            if wave is not None:
                file, length = args.output_dir / f"{i}-{name}.wav", f"{len(wave) / SAMPLE_RATE:.1f} s"
                soundfile.write(file, wave, SAMPLE_RATE)
                table.loc[i, name] = f'<audio controls src="{quote(file.name)}"></audio> {length}'
                told = f"{file}, {length}"
            report(name, f"entry {i}: {told}")
        if name in adapters:
            engine.model.unload()  # takes the adapter out of base_model
    return table


def compare(args: argparse.Namespace, device: torch.device) -> None:
    """Losses of base and adapters on the first 50 entries; what they sound like, in output_dir/index.html."""
    data, base, codec, settings = trainer.open_inputs(args, device)
    data.entries = data.entries[:50]
    used = {path: data.code_files[path] for entry in data.entries for path in dataset.clips_of(entry)}
    dataset.encode_missing(used, lambda: lora.load_codec(codec, device), args.num_workers)
    folders = sorted((folder.rstrip("/") for folder in args.adapter), key=len)  # checkpoint-20 before -100
    adapters = {Path(folder).resolve().name: folder for folder in folders}
    if len(adapters) < len(folders) or adapters.keys() & {"text", *COLUMNS}:  # not unique, or taken
        adapters = {f"adapter-{folder.replace('/', '-')}": folder for folder in folders}
    base_model = lora.load_base(base, lora.base_dtype(args.precision, device), device)
    model = trainer.LossModel(base_model)
    losses, trained = {"base": mean_losses(model, data, device)}, set()
    for name, folder in adapters.items():
        model.model, flags = lora.load_adapter(base_model, folder, settings["base_fingerprint"])
        trained.add(flags.get("manifest_fingerprint"))
        losses[name] = mean_losses(model, data, device)
        model.model.unload()
    table = pd.DataFrame(losses).T
    print(f"losses of {len(data.entries)} entries, teacher-forced:")
    print(table.to_string(float_format="{:.3f}".format))
    totals = table["total"]
    if totals.drop("base").isna().all():
        raise dataset.UserError("no adapter has a finite loss; take an earlier checkpoint, or lower --lr")
    smallest = totals.idxmin()  # without NaN
    report("smallest", f"loss: {adapters.get(smallest, smallest)}; listen before you choose")
    notes = [f"adapters: {', '.join(folders)}"]
    if settings["manifest_fingerprint"] in trained:
        notes.append("warning: these entries were trained, so the losses tell nothing: give held-out entries")
    if len(data.entries) < 20:
        notes.append("warning: under 20 held-out entries, differences can be chance")
    print(*notes, sep="\n")
    del model, base_model  # the engine loads its own
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sounds = [f"{i}-{name}.wav" for i in range(3) for name in [*COLUMNS, *adapters]]
    for name in ["index.html", *sounds]:  # an interrupted comparison must not leave it beside new sounds
        (args.output_dir / name).unlink(missing_ok=True)
    players = write_audio(args, data, settings, base, codec, adapters, device)
    heads = {name: f"{escape(name)}<br>loss {table['total'][name]:.3f}" for name in losses}
    heads[smallest] += ", the smallest"
    title = escape(f"{args.train_manifest}, {date.today()}")
    pd.set_option("display.max_colwidth", None)  # it cuts long cells off
    players = players.rename(columns=heads).to_html(escape=False, index=False)
    page = PAGE % (title, title, escape("\n".join(notes)), players)
    (args.output_dir / "index.html").write_text(page, encoding="utf-8")
    report("listen", f"open {args.output_dir}/index.html")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new or empty, to leave everything in")
    parser.add_argument("--adapter", nargs="+", help="trainer.py's --output_dir, or checkpoints")
    own, options = parser.parse_known_args()
    if own.keep and (options or own.adapter):
        parser.error("--keep takes no other flag: it is of the check with the tiny model")
    if not options and not own.adapter:
        return acceptance.accept(own.keep)
    args = trainer.parse_args(["--output_dir=listen", *options])
    args.adapter = own.adapter
    command = compare if own.adapter else preflight
    trainer.run_and_exit(lambda: command(args, trainer.start()))


if __name__ == "__main__":
    main()
