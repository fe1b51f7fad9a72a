"""From a ChatML manifest to the micro-batches of one optimizer step.

    load_manifest -> find_clips -> encode_clips -> measure -> StepSampler -> StepDataset (DataLoader worker)

Preprocessing, collation and codes are boson_multimodal's own, called as HiggsAudioServeEngine calls them.
"""

import base64
import functools
import hashlib
import io
import json
import os
import re
import signal
import uuid

import audioread
import librosa
import numpy as np
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

PLACEHOLDERS = ("placeholder", "")  # what inference takes in `audio_url` to mean "see raw_audio"
FIELDS = {  # of upstream's data classes (data_types.py); the first one of each must be there
    "message": {"role": str, "content": str | list | dict, "recipient": str | None},
    "text": {"text": str, "type": str},
    "audio": {"audio_url": str, "type": str, "raw_audio": str | None, "offset": int | float | None,
              "duration": int | float | None, "row_id": int | None},
}
# <|name|> in a text becomes structure (but for scene and instruction marks); a lone surrogate is no text.
NOT_TEXT = re.compile("<\\|(?!scene_desc_|generation_instruction_)[^|<>]*\\|>|[\ud800-\udfff]")
WHISPER_RATE, WHISPER_FRAMES = 16_000, 750  # Hz; 30 s in codec frames, what the audio tower takes whole
DECODER_ERRORS = (OSError, EOFError, RuntimeError, ValueError, ArithmeticError, MemoryError,
                  audioread.DecodeError, librosa.LibrosaError)  # what files of noise made librosa.load raise
is_file = functools.cache(os.path.isfile)


class PipelineError(Exception):
    """The user's input is at fault: the message says where, what was seen and what to do."""


def refuse(source, problems):
    """Raise one PipelineError for all `problems`, (where, what) pairs found in `source`; none, no error."""
    lines = [f"  {where}: {what}" for where, what in problems[:20]]
    lines += [f"  ... and {len(problems) - 20} more"] * (len(problems) > 20)
    if problems:
        raise PipelineError("\n".join([f"{source}: {len(problems)} problem(s)", *lines]))


def load_manifest(path):
    """Read a JSON array or JSONL of ChatML entries from a pathlib.Path; PipelineError lists all bad ones.

    Returns a list of dicts whose contents are lists and whose audio paths are absolute.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise PipelineError(f"manifest {path} cannot be read as UTF-8 text: {error}") from None
    pieces = [("the file", text)]
    if not text.lstrip().startswith("["):  # JSONL; splitlines() would also split at U+2028 inside a string
        pieces = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    entries, problems = [], []
    for where, piece in pieces:
        try:
            entries.append(json.loads(piece))
        except (ValueError, RecursionError) as error:
            problems.append((where, f"is not JSON ({error}); expected an array, or one object a line"))
    entries = entries[0] if entries and isinstance(entries[0], list) else entries
    refuse(path, problems if entries or problems else [("the file", "holds no entry; expected one or more")])
    folder = os.path.abspath(os.path.dirname(path))
    refuse(path, [(f"entry {i}", what) for i, e in enumerate(entries) for what in check_entry(e, folder)])
    return entries


def check_entry(entry, folder):
    """List what is wrong with one entry, above all what upstream would take in silence, but wrongly."""
    if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
        return ['is not ChatML; expected {"messages": [{"role": ..., "content": ...}, ...]}']
    start = 0 if entry.get("start_index") is None else entry["start_index"]
    if not isinstance(start, int) or start < 0:
        return [f'"start_index" is {start!r}; expected null or the number of the first turn to train']
    turns = list(enumerate(entry["messages"]))
    problems = [f"messages[{i}]: {what}" for i, turn in turns for what in check_turn(turn, i < start, folder)]
    if not problems and not any(i >= start and turn["role"] == "assistant" for i, turn in turns):
        return [f"has no assistant turn at or after start_index {start}; nothing would be trained"]
    return problems


def check_turn(turn, masked, folder):
    """List what is wrong with one message; `masked` ones lie before start_index and carry no loss."""
    if problem := mistyped("message", turn):
        return [problem]
    role, content, recipient = turn["role"], turn.get("content"), turn.get("recipient") or ""
    parts = content if isinstance(content, list) else [content]
    turn["content"] = parts = [{"text": part} if isinstance(part, str) else part for part in parts]
    problems = list(filter(None, (check_part(part, folder) for part in [*parts, {"text": recipient}])))
    if role not in ("system", "user", "assistant"):
        problems.append(f"role is {role!r}; expected system, user or assistant")
    if recipient and (masked or role != "assistant"):
        problems.append("a recipient belongs to assistant turns at or after start_index; remove it")
    return problems


def mistyped(kind, value):
    """Say how `value` differs from FIELDS[kind], which upstream checks as strictly, or None."""
    fields = FIELDS[kind]
    if not isinstance(value, dict) or next(iter(fields)) not in value:
        return f"{str(value)[:80]!r} is no ChatML {kind}; expected an object with fields of {list(fields)}"
    wrong = [name for name in value if not isinstance(value[name], fields.get(name, ()))]
    return f"{kind} has unknown or mistyped fields {wrong}; expected of {list(fields)}" if wrong else None


def check_part(part, folder):
    """Say what is wrong with one text or audio content, or None; makes an audio path absolute in place."""
    kind = "text" if isinstance(part, dict) and "text" in part else "audio"
    if problem := mistyped(kind, part):
        return problem
    if part.get("type", kind) != kind:
        return f"content of type {part['type']!r} has the fields of {kind}"
    if kind == "text":
        found = NOT_TEXT.search(part["text"])
        return found and f"text holds {found[0]!r}, which upstream would not read as text; remove it"
    url = part["audio_url"]
    if part.get("offset") is not None:
        return f"{url}: has an offset, but inference reads whole files; cut it to a file of its own"
    if url in PLACEHOLDERS:
        return None if part.get("raw_audio") else f"audio_url is {url!r} without raw_audio; give one of them"
    url = part["audio_url"] = url if "://" in url else os.path.abspath(os.path.join(folder, url))
    return None if is_file(url) else f"{url}: no such file; expected a local path, from the manifest's folder"


def clips_of(entry):
    """[(role, content, name)] of a checked entry's clips; the name is the path, or the inline base64."""
    return [(turn["role"], part, part["raw_audio" if part["audio_url"] in PLACEHOLDERS else "audio_url"])
            for turn in entry["messages"] for part in turn["content"] if "text" not in part]


def find_clips(entries, cache, fingerprint):
    """The distinct clips, {name: (file of its codes, first entry that has it, content)}."""
    clips = {}
    for i, entry in enumerate(entries):
        for _, part, name in [clip for clip in clips_of(entry) if clip[2] not in clips]:
            identity = [fingerprint, name]
            if name == part["audio_url"]:
                stat = os.stat(name)
                identity = [fingerprint, os.path.realpath(name), stat.st_size, stat.st_mtime_ns]
            digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
            clips[name] = (cache / f"{digest}.npy", i, part)
    return clips


def load_waveform(sample_rate, part):
    """Mono float32 (samples,) as inference loads it, or a string: what is wrong with the clip."""
    try:
        inline = part["audio_url"] in PLACEHOLDERS
        source = io.BytesIO(base64.b64decode(part["raw_audio"])) if inline else part["audio_url"]
        wave, _ = librosa.load(source, sr=sample_rate)
    except DECODER_ERRORS as error:
        return f"cannot be decoded ({type(error).__name__} {error}); write it again, as wav"
    if len(wave) < 0.1 * sample_rate:  # on less the codec's convolutions fail
        return f"lasts {len(wave) / sample_rate:.3f} s; the codec needs at least 0.1 s"
    return wave


def ignore_signals(_):
    """In a worker: Ctrl-C and SIGTERM reach the whole process group; the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def encode_clips(share, codec, num_workers, show):
    """Encode one rank's share of find_clips' values; a file appears whole or not at all. Refuses bad ones."""
    waves = DataLoader([part for _, _, part in share], batch_size=None, num_workers=num_workers,
                       collate_fn=functools.partial(load_waveform, codec.sampling_rate),
                       worker_init_fn=ignore_signals)
    problems = []
    for (file, entry, part), wave in zip(share, tqdm(waves, "encoding clips", disable=not show)):
        if isinstance(wave, str):
            problems.append((f"entry {entry}", f"{part['audio_url']}: {wave}"))
            continue
        # One clip at a time: padding a batch of clips changes their codes
        codes = codec.encode(wave, codec.sampling_rate).squeeze(0).cpu()  # (num_codebooks, T)
        unfinished = file.with_name(f"{uuid.uuid4().hex}.npy")
        np.save(unfinished, codes.numpy().astype(np.int16))
        unfinished.rename(file)
    refuse("clips", problems)


def measure(entries, clips, collator):
    """About how many positions each entry takes (tokenizing costs 1 ms); refuses what Whisper fails on."""
    frames = {name: np.load(file, mmap_mode="r").shape[1] for name, (file, _, _) in clips.items()}
    lengths, problems = [], []
    for i, entry in enumerate(entries):
        audio = [(role == "assistant", frames[name]) for role, _, name in clips_of(entry)]
        whole = all(spoken or length < WHISPER_FRAMES for spoken, length in audio)
        if collator.encode_whisper_embed and not (whole and audio == sorted(audio, key=lambda c: c[0])):
            problems.append((f"entry {i}", "Whisper needs references under 30 s, before all spoken clips"))
        texts = [part.get("text", "") for turn in entry["messages"] for part in turn["content"]]
        codes = sum(length + 9 for spoken, length in audio if spoken or collator.return_audio_in_tokens)
        lengths.append(sum(6 + len(text) // 3 for text in texts) + codes)
    refuse("reference clips", problems)
    return lengths


def deal(items, loads, shares):
    """Longest first, each item to the share with the least load: loads differ by at most the longest item."""
    hands, totals = [[] for _ in range(shares)], [0] * shares
    for item in sorted(items, key=lambda item: -loads[item]):
        lightest = totals.index(min(totals))
        hands[lightest].append(item)
        totals[lightest] += loads[item]
    return hands


class StepSampler(Sampler):
    """Yields one rank's share, (indices, trained), of every optimizer step in `steps`.

    An epoch is a permutation drawn from (seed, epoch) alone, cut into steps of `samples_per_step`. A rank
    left without a sample takes part with the step's shortest one, which is not `trained`.
    """

    def __init__(self, lengths, samples_per_step, seed, rank, world_size, steps):
        self.lengths, self.samples_per_step, self.seed = lengths, samples_per_step, seed
        self.rank, self.world_size, self.steps = rank, world_size, steps

    def __iter__(self):
        for step in self.steps:
            epoch, position = divmod(step, -(-len(self.lengths) // self.samples_per_step))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
            samples = order[position * self.samples_per_step :][: self.samples_per_step].tolist()
            share = deal(samples, self.lengths, self.world_size)[self.rank]
            yield (share, True) if share else ([min(samples, key=self.lengths.__getitem__)], False)


class StepDataset(Dataset):
    """One item is one rank's share of one optimizer step: its micro-batches, a list of (batch, counts).

    batch is upstream's HiggsAudioBatchInput as a dict (pin_memory would leave a dataclass unpinned); counts
    (num_codebooks + 4,): labels of text and of each codebook, samples, positions, positions with padding.
    """

    def __init__(self, entries, clips, tokenizer, collator, batch_size, max_tokens):
        self.entries, self.clips, self.tokenizer = entries, clips, tokenizer
        self.collator, self.batch_size, self.max_tokens = collator, batch_size, max_tokens

    def __getitem__(self, share):
        indices, trained = share
        samples = sorted(map(self.sample, indices), key=lambda pair: -pair[0])
        micro_batches, room = [], 0
        for length, sample in samples:  # longest first: the first of a micro-batch gives its width
            if not micro_batches or len(micro_batches[-1]) == room:
                micro_batches.append([])
                room = max(1, self.max_tokens // length) if self.max_tokens else self.batch_size
            micro_batches[-1].append((length, sample))
        return [self.collate(*zip(*micro_batch), trained) for micro_batch in micro_batches]

    def sample(self, index):
        """(positions, sample) of one entry, afresh: the collator leaves marks in it that it would misread."""
        entry = {key: self.entries[index].get(key) for key in ("messages", "start_index")}
        input_ids, label_ids, _, _ = prepare_chatml_sample(entry, self.tokenizer)
        if input_ids is None:
            raise PipelineError(f"entry {index}: upstream's prepare_chatml_sample refuses it")
        codes = [torch.from_numpy(np.load(self.clips[name][0])).long() for _, _, name in clips_of(entry)]
        waves = [load_waveform(WHISPER_RATE, part) for role, part, _ in clips_of(entry)
                 if role != "assistant" and self.collator.encode_whisper_embed]
        sample = ChatMLDatasetSample(
            input_ids=torch.LongTensor(input_ids), label_ids=torch.LongTensor(label_ids),
            audio_ids_concat=torch.cat(codes, dim=1) if codes else torch.zeros(8, 0),  # (codebooks, frames)
            audio_ids_start=torch.tensor([0, *(len(code.T) for code in codes)]).cumsum(0)[:-1],
            audio_waveforms_concat=torch.from_numpy(np.concatenate([[], *waves])).float(),  # (audio samples,)
            audio_waveforms_start=torch.tensor([0, *(len(wave) for wave in waves)]).cumsum(0)[:-1],
            audio_sample_rate=torch.full((len(waves),), WHISPER_RATE), audio_speaker_indices=None)
        tokens = self.collator.audio_in_token_id, self.collator.audio_out_token_id
        length = sample.cal_num_tokens(bool(waves), self.collator.return_audio_in_tokens, True, *tokens)
        length += len(codes) * (self.collator.audio_num_codebooks + 1)  # BOS, EOS, delay: upstream omits them
        return -(-length // 8) * 8, sample  # upstream pads to a multiple of 8

    def collate(self, lengths, samples, trained):
        batch = vars(self.collator(list(samples)))
        labels = [batch["label_ids"], *batch["label_audio_ids"]]  # of text and, where a clip is, of codebooks
        labels = labels if trained else [label.fill_(-100) for label in labels]
        counts = torch.zeros(self.collator.audio_num_codebooks + 4, dtype=torch.long)
        counts[: len(labels)] = torch.tensor([(label[..., 1:] != -100).sum() for label in labels])
        counts[-3:] = torch.tensor([len(samples) * trained, sum(lengths), len(samples) * lengths[0]])
        return batch, counts


def build_collator(config, whisper_processor, return_audio_in_tokens):
    """The collator exactly as serve_engine.py builds it, but for `return_audio_in_tokens`."""
    return HiggsAudioSampleCollator(
        whisper_processor=whisper_processor, encode_whisper_embed=config.encode_whisper_embed,
        audio_in_token_id=config.audio_in_token_idx, audio_out_token_id=config.audio_out_token_idx,
        audio_stream_bos_id=config.audio_stream_bos_id, audio_stream_eos_id=config.audio_stream_eos_id,
        pad_token_id=config.pad_token_id, return_audio_in_tokens=return_audio_in_tokens, round_to=1,
        use_delay_pattern=config.use_delay_pattern, audio_num_codebooks=config.audio_num_codebooks)
