"""Prove the pipeline on this machine, or see what your own data holds before you pay for a training:

    python validate_pipeline.py               builds a tiny random checkpoint, trains on it, checks it all:
                                              offline, without a GPU, in under three minutes
    python validate_pipeline.py --keep DIR    the same; checkpoint, codec, clips and manifest stay in DIR
    python validate_pipeline.py --train_manifest M --base_ckpt B [any other option of trainer.py]
                                              preflight: what M holds, what is suspicious or too large in it
    python validate_pipeline.py --base_ckpt B --adapter O [O/checkpoint-N ...] [--train_manifest M]
                                              losses of base and adapters on M, wav files of its first entry
"""

import argparse
import collections
import sys
import time
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import lora
import output
import trainer
from dataset import PipelineError
from tests import acceptance

SAMPLE_RATE = 24_000  # the codec's, 1/s


def tell(name, text):
    print(f"{name:<11} {text}", flush=True)


def split_clips(entry):
    """(names of its reference clips, [(names of a trained turn's clips, the text it answers)])."""
    references, targets, said = [], [], ""
    for i, turn in enumerate(entry["messages"]):
        names = [name for _, _, name in dataset.clips_of({"messages": [turn]})]
        text = " ".join(part["text"] for part in turn["content"] if "text" in part)
        if turn["role"] == "assistant" and i >= (entry.get("start_index") or 0):
            targets.append((names, f"{said} {text}".strip() if names else ""))
        else:
            references += names
            said = text
    return references, targets


def describe_data(entries, frames):
    """Entries, clips, hours, and how long their texts are, by script: what a language is written in."""
    parts = [split_clips(entry) for entry in entries]
    masked = sum(bool(entry.get("start_index")) for entry in entries)
    tell("entries", f"{len(entries):,} ({masked:,} with a start_index), {len(frames):,} distinct clips")
    references = {clip for references, _ in parts for clip in references}
    targets = {clip for _, targets in parts for clips, _ in targets for clip in clips}
    for name, clips in (("references", references), ("targets", targets)):
        hours = sum(frames[clip] for clip in clips) / output.FRAME_RATE / 3600
        tell(name, f"{hours:,.2f} hours in {len(clips):,} distinct clips")
    texts = collections.defaultdict(list)  # script: characters of each entry
    for entry in entries:
        text = " ".join(part["text"] for turn in entry["messages"] for part in turn["content"]
                        if "text" in part and turn["role"] != "system")
        scripts = collections.Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
        texts[(scripts.most_common(1) or [("no letters", 0)])[0][0].lower()].append(len(text))
    for script, sizes in texts.items():
        tell("text", f"{script}: {len(sizes):,} entries of {min(sizes):,} to {max(sizes):,} characters, "
                     f"median {np.median(sizes):,.0f}")


def describe_steps(lengths, args, max_tokens):
    """Lengths as a histogram; steps and padding of an epoch. Returns {ranks: its positions with padding}."""
    counts, edges = np.histogram(lengths, bins=10)
    for n, low, high in zip(counts, edges, edges[1:]):
        tell("positions", f"{low:>6,.0f} to {high:>6,.0f} {'#' * -(-40 * n // counts.max()):<40} {n:,}")
    padded = {}
    for ranks in (1, 8):
        size = args.batch_size * args.grad_accum * ranks
        steps = range(-(-len(lengths) // size))
        shares = [[(lengths[i], i) for i in share] for rank in range(ranks)
                  for share, _ in dataset.deal_steps(lengths, size, args.seed, rank, ranks, steps)]
        batches = [cut for share in shares for cut in dataset.cut(share, args.batch_size, max_tokens)]
        padded[ranks] = sum(len(batch) * batch[0][0] for batch in batches)
        padding = 1 - sum(length for batch in batches for length, _ in batch) / padded[ranks]
        tell(f"{ranks} GPU{'s' * (ranks > 1)}", f"{len(steps):,} optimizer steps an epoch of {size} samples; "
                                               f"{padding:.1%} of the positions are padding")
    return padded


def show_targets(data, tokenizer):
    """One entry decoded back: what the model is given, and what it is trained to answer."""
    [(batch, counts)] = data[[0], True]
    ids, labels = batch["input_ids"][0], batch["label_ids"][0]
    start = (labels != -100).nonzero()[0, 0]
    reply = ids[start:][(labels[start:] != -100) | (ids[start:] == data.collator.audio_out_token_id)]
    tell("entry 0", f"is given {tokenizer.decode(ids[:start])!r}")
    tell("", f"and trained on {tokenizer.decode(reply)!r}: {counts[0]} labels of text, {counts[1]} in each "
             f"of {len(counts) - 4} codebooks")


def listen(part):
    """(seconds of silence at the end, 40 dB below its loudest moment; share of clipped samples) of a clip."""
    wave = dataset.load_waveform(SAMPLE_RATE, part)
    end = librosa.effects.trim(wave, top_db=40)[1][1] if np.abs(wave).max() > 0.01 else 0
    return float(len(wave) - end) / SAMPLE_RATE, float(np.mean(np.abs(wave) > 0.99))


def suspect(entries, clips, frames, num_workers):
    """[(indices, what)] of entries that are valid, but not what a voice should be taught with."""
    found, rates = [], {}
    for i, entry in enumerate(entries):
        references, targets = split_clips(entry)
        both = set(references) & {name for names, _ in targets for name in names}
        found += [([i], f"{name[:200]} is both reference and target") for name in both]
        seconds = sum(frames[name] for names, _ in targets for name in names) / output.FRAME_RATE
        if seconds:
            rates[i] = sum(len(text) for _, text in targets) / seconds
    usual = np.median(list(rates.values())) if rates else 0
    found += [([i], f"its text has {rate:.1f} characters a second of its clip, {usual:.1f} are usual")
              for i, rate in rates.items() if not usual / 3 <= rate <= usual * 3]
    heard = DataLoader([part for _, _, part in clips.values()], batch_size=None, num_workers=num_workers,
                       collate_fn=listen, worker_init_fn=dataset.ignore_signals)
    for (_, indices, part), (silence, clipped) in zip(clips.values(), tqdm(heard, "listening to the clips")):
        found += [(indices, f"{part['audio_url']} ends in {silence:.1f} s of silence")] * (silence > 0.5)
        found += [(indices, f"{part['audio_url']} is clipped: {clipped:.1%} of it")] * (clipped > 1e-3)
    return found


def last_hidden(model, text_head, batch):
    """The hidden state of the last position, (hidden,) in float32."""
    with torch.no_grad():
        return lora.forward(model, batch, text_head)[0].logits[0, -1].float()


def check_heard(model, text_head, data):
    """By which ways the first reference reaches the model: its sound is played backwards on each of them."""
    cited = next((i for i, entry in enumerate(data.entries) if split_clips(entry)[0]), None)
    if cited is None:
        return tell("reference", "there is none")
    [(batch, _)], ways = data[[cited], True], {}
    if batch["audio_in_ids"] is not None and batch["audio_in_ids"].numel():  # (num_codebooks, T)
        ways["as codes"] = {"audio_in_ids": batch["audio_in_ids"].flip(1)}
    if batch["audio_features"] is not None and len(batch["audio_features"]):  # (clips, mel bins, T)
        ways["by Whisper"] = {"audio_features": batch["audio_features"].flip(2)}
    first = batch["label_audio_ids"][:, : (batch["audio_out_ids_start"].tolist() + [None])[1]]
    if first.numel() and (first == -100).all():  # a reply that is not trained
        codes = batch["audio_out_ids"].clone()
        codes[:, : first.shape[1]] = codes[:, : first.shape[1]].flip(1)
        ways["as an earlier reply"] = {"audio_out_ids": codes}
    before, heard = last_hidden(model, text_head, batch), []
    for way, backwards in ways.items():
        change = (last_hidden(model, text_head, batch | backwards) - before).norm() / before.norm()
        heard += [f"{way} (backwards it changes the last hidden state by {change:.1%})"] if change else []
    tell("reference", f"of entry {cited} is {'heard ' + ', '.join(heard) if heard else 'NOT heard'}")


def try_largest(model, text_head, data, lengths, args):
    """Forward and backward of the largest micro-batch: its memory, and time per epoch from that."""
    model = lora.distribute(model)
    trainer.rehearse(model, text_head, data, lengths)
    padded = describe_steps(lengths, args, data.max_tokens)  # on a GPU that is known now
    began = time.perf_counter()
    counts = trainer.rehearse(model, text_head, data, lengths)
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    took = (time.perf_counter() - began) / 2  # it runs twice
    tell("largest", f"micro-batch: {counts[-3]} samples, {counts[-1]:,} positions with padding; {took:.2f} s "
                    f"forward and backward, {output.peak_memory() / 1e9:.2f} GB peak memory")
    for ranks, positions in padded.items():
        hours = took / counts[-1] * positions / ranks / 3600
        tell("estimate", f"{hours:.2f} hours an epoch on {ranks} GPU{'s' * (ranks > 1)} like this device")


def preflight(args, store, device):
    """What trainer.py would do with the user's own data. Raises PipelineError where that would."""
    entries, clips, codec, tokenizer, collator, _ = lora.open_inputs(args, device)
    trainer.encode_missing(list(clips.values()), codec, device, args.num_workers, store)
    lengths, frames = dataset.measure(entries, clips, collator)
    data = dataset.StepDataset(entries, clips, tokenizer, collator, args.batch_size, args.max_tokens)
    describe_data(entries, frames)
    show_targets(data, tokenizer)
    suspicious = suspect(entries, clips, frames, args.num_workers)
    model, text_head = lora.build_model(args, device)
    tell("trainable", f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    check_heard(model, text_head, data)
    try_largest(model, text_head, data, lengths, args)
    try:
        dataset.refuse("worth a look, though all of it would train", suspicious)
    except PipelineError as error:
        print(error)
    print("ready for trainer.py with the same options")


def open_comparison(args, store, device):
    """StepDataset of the manifest's first 50 entries; without a manifest of one sentence."""
    if args.train_manifest.name:
        entries, clips, codec, tokenizer, collator, _ = lora.open_inputs(args, device)
        clips = {name: clip for name, clip in clips.items() if clip[1][0] < 50}
        trainer.encode_missing(list(clips.values()), codec, device, args.num_workers, store)
    else:
        config, tokenizer, _ = lora.open_base(args.base_ckpt)
        collator, clips = lora.build_collator(config, args.whisper_processor, False), {}
        entries = [{"messages": [{"role": "user", "content": [{"text": "When does the sun rise?"}]},
                                 {"role": "assistant", "content": [{"text": "In the morning."}]}]}]
    return dataset.StepDataset(entries[:50], clips, tokenizer, collator, args.batch_size, None)


def answer(model, text_head, data):
    """Teacher-forced: mean losses of text, audio and each codebook; logits of the shortest entries, flat."""
    sums = counts = 0
    with torch.no_grad():
        for batch, own_counts in data[range(len(data.entries)), True]:
            outputs, batch = lora.forward(model, batch, text_head)
            sums = sums + trainer.loss_sums(outputs, batch, own_counts, text_head).cpu()
            counts = counts + own_counts[:-3]
    logits = text_head(outputs.logits[:, -64:]).flatten(), outputs.audio_logits.flatten()
    means = (sums / counts.clamp(min=1)).nan_to_num(torch.inf)
    return torch.cat([means[:1], means[1:].mean(0, keepdim=True), means[1:]]), torch.cat(logits).float()


def speak(args, adapter, data, device):
    """Write entry 0 as base and adapter speak it, by HiggsAudioServeEngine at one seed, and its target."""
    logger.disable("boson_multimodal")  # it tells each of its steps
    with dataset.blaming(f"--audio_tokenizer {args.audio_tokenizer}: upstream's engine cannot load it"):
        engine = HiggsAudioServeEngine(args.base_ckpt, args.audio_tokenizer, device=device.type,
                                       torch_dtype=lora.base_dtype(args, device))
    engine.collator.return_audio_in_tokens = data.collator.return_audio_in_tokens
    turns, waves = data.entries[0]["messages"], {}
    reply = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("base", "adapter"):
        (args.output_dir / f"{name}.wav").unlink(missing_ok=True)  # of another adapter
        if name == "adapter":
            engine.model.decode_graph_runners.clear()  # on a GPU they have captured the base
            engine.model = lora.load_adapter(engine.model, adapter)
        try:
            waves[name] = engine.generate({"messages": turns[:reply]}, 1024, seed=args.seed).audio
        except (IndexError, RuntimeError) as error:  # upstream's, where none came out, or too little
            tell(name, f"emits no audio ({error})")
    for _, _, clip in dataset.clips_of({"messages": turns[reply:]}):
        codes = torch.tensor(dataset.load_codes(data.clips[clip][0]), dtype=torch.long)  # (num_codebooks, T)
        waves["target"] = engine.audio_tokenizer.decode(codes[None].to(device))[0, 0]
    for name, wave in waves.items():
        soundfile.write(args.output_dir / f"{name}.wav", wave, SAMPLE_RATE)
        tell(name, f"{args.output_dir / name}.wav, {len(wave) / SAMPLE_RATE:.1f} s")


def compare(args, store, device, adapters):
    """Losses of base and adapters; that the last is heard, and merges well; with a manifest, wav files."""
    data = open_comparison(args, store, device)
    base = lora.load_base(args.base_ckpt, lora.base_dtype(args, device), device)
    text_head = lora.take_text_head(base)
    answers = {"(base)": answer(base, text_head, data)}
    for name in adapters:
        model = lora.load_adapter(base, name)
        answers[name] = answer(model, text_head, data)
        model.unload()
    lora.load_adapter(base, adapters[-1]).merge_and_unload()  # in place
    answers["(merged)"] = answer(base, text_head, data)
    tell("losses", f"of {len(data.entries)} entries, teacher-forced: text, audio, codebooks 0 to 7")
    for name, (losses, _) in answers.items():
        tell("", " ".join(f"{loss:7.3f}" for loss in losses) + f"  {name}")
    tell("best", f"{min(adapters, key=lambda name: answers[name][0][:2].sum())}, by text and audio loss")
    before, after, merged = (answers[name][1] for name in ("(base)", adapters[-1], "(merged)"))  # flat logits
    change = after - before
    changed, rounded = ((x.norm() / after.norm()).item() for x in (change, merged - after))
    kept = ((merged - before) @ change / change.square().sum()).item()  # rounding has no direction
    tell("logits", f"changed by {changed:.1%}; merged, by {kept:.1%} of that, and off by {rounded:.1e}")
    if not 0 < changed < torch.inf:
        raise PipelineError(f"{adapters[-1]} changes the logits by {changed}: untrained, or not finite")
    if rounded > min(100 * torch.finfo(base.dtype).eps, 0.1) or not 0.5 < kept < 1.5:
        raise PipelineError(f"merged, {adapters[-1]} is another: that is more than {base.dtype} rounds")
    if args.train_manifest.name:
        del base, model  # the engine loads its own
        speak(args, adapters[-1], data, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new or empty, to leave everything in")
    parser.add_argument("--adapter", nargs="+", default=[], help="trainer.py's --output_dir, or checkpoints")
    own, options = parser.parse_known_args()
    if not (options or own.adapter):
        return acceptance.accept(own.keep)
    try:
        optional = ["--output_dir=listen", *["--train_manifest="] * bool(own.adapter)]
        args = trainer.parse_args([*optional, *options])
        store, device, _, _ = trainer.join_ranks()
        compare(args, store, device, own.adapter) if own.adapter else preflight(args, store, device)
    except PipelineError as error:
        sys.exit(f"to fix first:\n{error}")


if __name__ == "__main__":
    main()
