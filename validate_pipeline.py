"""Prove the pipeline on this machine, or see what your own data holds before you pay for a training:

    python validate_pipeline.py               builds a tiny random checkpoint, trains on it, checks it all:
                                              offline, without a GPU, in under three minutes
    python validate_pipeline.py --keep DIR    the same; checkpoint, codec, clips and manifest stay in DIR
    python validate_pipeline.py --train_manifest M --base_ckpt B [any other option of trainer.py]
                                              preflight: tells what M holds and what is suspicious in it, and
                                              runs the largest micro-batch; encodes its clips for the training
"""

import argparse
import collections
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import lora
import trainer
from dataset import PipelineError
from tests import acceptance

FRAME_RATE, SAMPLE_RATE = 25, 24_000  # the codec's, 1/s
READY = """torchrun --nproc_per_node=8 trainer.py --train_manifest train.json --output_dir out \\
    --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \\
    --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05"""


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
        hours = sum(frames[clip] for clip in clips) / FRAME_RATE / 3600
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


def describe_steps(lengths, args):
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
        batches = [batch for share in shares
                   for batch in dataset.cut(share, args.batch_size, args.max_tokens)]
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
    clip = torch.tensor(data.collator.audio_out_token_id)
    answer = ids[start:][(labels[start:] != -100) | (ids[start:] == clip)]
    tell("entry 0", f"is given {tokenizer.decode(ids[:start])!r}")
    tell("", f"and trained on {tokenizer.decode(answer)!r}: {counts[0]} labels of text, {counts[1]} in each "
             f"of {len(counts) - 4} codebooks")


def listen(part):
    """(seconds of silence at the end, share of clipped samples) of one clip."""
    wave = dataset.load_waveform(SAMPLE_RATE, part)
    loud = np.abs(wave).max() > 0.01  # trim compares with the clip's own loudest moment
    end = librosa.effects.trim(wave, top_db=40)[1][1] if loud else 0
    return float(len(wave) - end) / SAMPLE_RATE, float(np.mean(np.abs(wave) > 0.99))


def suspect(entries, clips, frames, num_workers):
    """[(indices, what)] of entries that are valid, but not what a voice should be taught with."""
    found, rates = [], {}
    for i, entry in enumerate(entries):
        references, targets = split_clips(entry)
        both = set(references) & {name for names, _ in targets for name in names}
        found += [([i], f"{name[:200]} is both reference and target") for name in both]
        seconds = sum(frames[name] for names, _ in targets for name in names) / FRAME_RATE
        if seconds:
            rates[i] = sum(len(text) for _, text in targets) / seconds
    usual = np.median(list(rates.values())) if rates else 0
    found += [([i], f"its text has {rate:.1f} characters a second of its clip, {usual:.1f} are usual")
              for i, rate in rates.items() if not usual / 3 <= rate <= usual * 3]
    heard = DataLoader([part for _, _, part in clips.values()], batch_size=None, num_workers=num_workers,
                       collate_fn=listen, worker_init_fn=dataset.ignore_signals)
    for (_, indices, part), (silence, clipped) in zip(clips.values(), tqdm(heard, "listening to the clips")):
        name = part["audio_url"]
        found += [(indices, f"{name} ends in {silence:.1f} s of silence")] * (silence > 0.5)
        found += [(indices, f"{name} is clipped: {clipped:.1%} of its samples")] * (clipped > 1e-3)
    return found


def last_hidden(model, text_head, batch):
    """The hidden state of the last position, (hidden,) in float32."""
    device, bf16 = text_head.weight.device, text_head.weight.dtype == torch.bfloat16
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(**batch).logits[0, -1].float()


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


def try_largest(model, text_head, data, lengths, padded):
    """Forward and backward of the largest micro-batch: its memory, and time per epoch from that."""
    model = DistributedDataParallel(model, broadcast_buffers=False)
    trainer.rehearse(model, text_head, data, lengths)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the codec's
    began = time.perf_counter()
    counts = trainer.rehearse(model, text_head, data, lengths)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took = (time.perf_counter() - began) / 2  # it runs twice
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tell("largest", f"micro-batch: {counts[-3]} samples, {counts[-1]:,} positions with padding; {took:.2f} s "
                    f"forward and backward, {peak / 1e9:.2f} GB peak memory")
    for ranks, positions in padded.items():
        hours = took / counts[-1] * positions / ranks / 3600
        tell("estimate", f"{hours:.2f} hours an epoch on {ranks} GPU{'s' * (ranks > 1)} like this device")


def preflight(args):
    """What trainer.py would do with the user's own data. Raises PipelineError where that would."""
    store, device, _, _ = trainer.join_ranks()
    entries, clips, codec, tokenizer, collator, _ = lora.open_inputs(args, device)
    trainer.encode_missing(list(clips.values()), codec, device, args.num_workers, store)
    lengths, frames = dataset.measure(entries, clips, collator)
    data = dataset.StepDataset(entries, clips, tokenizer, collator, args.batch_size, args.max_tokens)
    describe_data(entries, frames)
    padded = describe_steps(lengths, args)
    show_targets(data, tokenizer)
    suspicious = suspect(entries, clips, frames, args.num_workers)
    model, text_head = lora.build_model(args, device)
    tell("trainable", f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    check_heard(model, text_head, data)
    try_largest(model, text_head, data, lengths, padded)
    try:
        dataset.refuse("worth a look, though all of it would train", suspicious)
    except PipelineError as error:
        print(error)
    print("ready for trainer.py with the same options")


def accept(keep):
    """Build, train and check everything in the folder `keep`, or in a temporary one."""
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        hub = {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        if not hub.items() <= os.environ.items():  # huggingface_hub reads them once, when it is imported
            if any(folder.glob("*")):
                sys.exit(f"--keep {folder} is not empty; choose another folder")
            sys.exit(subprocess.call([sys.executable, __file__, "--keep", folder], env=os.environ | hub))
        if failed := acceptance.validate(folder):
            sys.exit(f"FAILED: {', '.join(failed)}")
    print("🎉 ALL VALIDATION TESTS PASSED!")
    print("📋 Ready for training with torchrun command...")
    print(READY)


def main():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forks, and tokenizers warns of each
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new or empty, to leave everything in")
    args, options = parser.parse_known_args()
    if not options:
        return accept(args.keep)
    try:
        preflight(trainer.parse_args(["--output_dir", "unused", *options]))
    except PipelineError as error:
        sys.exit(f"to fix first:\n{error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
