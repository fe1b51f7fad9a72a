"""From a ChatML manifest to the micro-batches of one optimizer step.

    load_manifest -> find_clips -> encode_clips -> measure -> deal_steps -> StepDataset (DataLoader worker)

Preprocessing, collation and codes are boson_multimodal's own, called as HiggsAudioServeEngine calls them.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import re
import signal
import tokenize

import audioread
import librosa
import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from safetensors import SafetensorError
from torch.utils.data import Dataset

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
FILE_ERRORS = (  # what libraries raised on files that are missing, damaged or something else
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    MemoryError, SyntaxError, audioread.DecodeError, librosa.LibrosaError, pickle.UnpicklingError,
    tokenize.TokenError, SafetensorError)
is_file = functools.cache(os.path.isfile)


class PipelineError(Exception):
    """The user's input is at fault: the message says where, what was seen and what to do."""


@contextlib.contextmanager
def blaming(what):
    """Turn what libraries raise on files that are not what they should be into PipelineError `what`."""
    try:
        yield
    except FILE_ERRORS as error:
        raise PipelineError(f"{what} ({type(error).__name__}: {error})") from None


def refuse(source, problems):
    """Raise one PipelineError for all `problems` in `source`, [(indices of entries, or a place; what)]."""
    lines = []
    for where, what in problems[:20]:
        if not isinstance(where, str):
            indices = list(dict.fromkeys(where))  # an entry may have a clip twice
            more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
            where = f"entr{'ies' if indices[1:] else 'y'} {', '.join(map(str, indices[:5]))}{more}"
        lines.append(f"  {where}: {what}")
    lines += [f"  ... and {len(problems) - 20} more"] * (len(problems) > 20)
    if problems:
        raise PipelineError("\n".join([f"{source}: {len(problems)} problem(s)", *lines]))


def load_manifest(path):
    """Read a JSON array or JSONL of ChatML entries from a pathlib.Path; PipelineError lists all bad ones.

    Returns a list of dicts whose contents are lists and whose audio paths are absolute.
    """
    with blaming(f"manifest {path} cannot be read as UTF-8 text"):
        text = path.read_text(encoding="utf-8-sig")
    # JSONL where it is no array; splitlines() would also split at U+2028 inside a string
    pieces = [text] if text.lstrip().startswith("[") else text.split("\n")
    entries, problems = [], []
    for i, piece in enumerate(pieces, 1):
        try:
            entries += [json.loads(piece)] if piece.strip() else []
        except (ValueError, RecursionError) as error:
            where = f"line {i}" if len(pieces) > 1 else "the file"
            problems.append((where, f"is not JSON ({error}); expected an array, or one object a line"))
    entries = entries[0] if entries and isinstance(entries[0], list) else entries
    refuse(path, problems if entries or problems else [("the file", "holds no entry; expected one or more")])
    folder = os.path.abspath(os.path.dirname(path))
    refuse(path, [([i], what) for i, entry in enumerate(entries) for what in check_entry(entry, folder)])
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
    """The distinct clips, {name: (file of its codes, indices of the entries that have it, content)}."""
    clips = {}
    for i, entry in enumerate(entries):
        for _, part, name in clips_of(entry):
            if name not in clips:
                stat = os.stat(name) if name == part["audio_url"] else None
                identity = [os.path.realpath(name), stat.st_size, stat.st_mtime_ns] if stat else [name]
                digest = hashlib.sha256(json.dumps([fingerprint, *identity]).encode()).hexdigest()
                clips[name] = (cache / f"{digest}.npy", [], part)
            clips[name][1].append(i)
    return clips


def load_codes(file):
    """One clip's codes from the cache, int16 (num_codebooks, T), or None: there are none, or damaged ones."""
    try:
        codes = np.lib.format.open_memmap(file, mode="r")
        return codes if codes.ndim == 2 and codes.offset + codes.nbytes == os.path.getsize(file) else None
    except FILE_ERRORS:
        return None


def load_waveform(sample_rate, part):
    """Mono float32 (samples,) as inference loads it, or a string: what is wrong. Rate 0: header's seconds."""
    inline = part["audio_url"] in PLACEHOLDERS
    name = "raw_audio" if inline else part["audio_url"]
    try:
        source = io.BytesIO(base64.b64decode(part["raw_audio"])) if inline else name
        wave = librosa.load(source, sr=sample_rate)[0] if sample_rate else librosa.get_duration(path=source)
    except FILE_ERRORS as error:
        return f"{name}: cannot be decoded ({type(error).__name__} {error}); write it again, as wav"
    seconds = len(wave) / sample_rate if sample_rate else wave  # under 0.1 the codec's convolutions fail
    return f"{name}: lasts {seconds:.3f} s; the codec needs at least 0.1 s" if seconds < 0.1 else wave


def find_missing(clips):
    """Indices of the clips to encode; refuses at once, by their headers, those that cannot be."""
    missing = [i for i, (file, _, _) in enumerate(clips) if load_codes(file) is None]
    found = [(clips[i][1], load_waveform(0, clips[i][2])) for i in missing]
    refuse("clips", [(entries, what) for entries, what in found if isinstance(what, str)])
    return list({clips[i][0]: i for i in missing}.values())  # links to one file share its codes


def ignore_signals(_):
    """In a worker: Ctrl-C and SIGTERM reach the whole process group; the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def measure(entries, clips, collator):
    """([positions of each entry], {clip: its codec frames}); estimated, as tokenizing an entry takes 1 ms."""
    shapes = {name: getattr(load_codes(file), "shape", None) for name, (file, _, _) in clips.items()}
    lost = [(clips[name][1], clips[name][0]) for name, shape in shapes.items() if shape is None]
    refuse("codes lost, or unseen on this node; give a --code_cache that all share", lost)
    frames, lengths, problems = {name: shape[1] for name, shape in shapes.items()}, [], []
    for i, entry in enumerate(entries):
        audio = [(role == "assistant", frames[name]) for role, _, name in clips_of(entry)]
        whole = all(spoken or length < WHISPER_FRAMES for spoken, length in audio)
        if collator.encode_whisper_embed and not (whole and audio == sorted(audio, key=lambda c: c[0])):
            problems.append(([i], "Whisper needs references under 30 s, before all spoken clips"))
        texts = [part.get("text", "") for turn in entry["messages"] for part in turn["content"]]
        spoken = sum(length + 9 for spoken, length in audio if spoken or collator.return_audio_in_tokens)
        lengths.append(sum(6 + len(text.encode()) // 4 for text in texts) + spoken)
    refuse("reference clips", problems)
    return lengths, frames


def deal_steps(lengths, samples_per_step, seed, rank, world_size, steps):
    """Yield one rank's share, (indices, trained), of every optimizer step in `steps` (a range, from 0).

    An epoch is a permutation drawn from (seed, epoch), cut into steps. Longest first, a step's samples go to
    the rank with the least load. One left without takes part with the shortest, which is not `trained`.
    """
    for step in steps:
        epoch, position = divmod(step, -(-len(lengths) // samples_per_step))
        if position == 0 or step == steps[0]:
            order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
        samples = order[position * samples_per_step :][:samples_per_step].tolist()
        shares, loads = [[] for _ in range(world_size)], [0] * world_size
        for sample in sorted(samples, key=lambda sample: -lengths[sample]):
            lightest = loads.index(min(loads))
            shares[lightest].append(sample)
            loads[lightest] += lengths[sample]
        yield (shares[rank], True) if shares[rank] else ([min(samples, key=lengths.__getitem__)], False)


def cut(samples, batch_size, max_tokens):
    """Cut (positions, sample) pairs into micro-batches, longest first: its first gives each its width."""
    micro_batches, room = [], 0
    for length, sample in sorted(samples, key=lambda pair: -pair[0]):
        if not micro_batches or len(micro_batches[-1]) == room:
            micro_batches.append([])
            room = max(1, max_tokens // length) if max_tokens else batch_size
        micro_batches[-1].append((length, sample))
    return micro_batches


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
        micro_batches = cut(map(self.sample, indices), self.batch_size, self.max_tokens)
        return [self.collate(*zip(*micro_batch), trained) for micro_batch in micro_batches]

    def sample(self, index):
        """(positions, sample) of one entry, afresh: the collator leaves marks in it that it would misread."""
        entry = {key: self.entries[index].get(key) for key in ("messages", "start_index")}
        input_ids, label_ids, _, _ = prepare_chatml_sample(entry, self.tokenizer)
        codes = [load_codes(self.clips[name][0]) for _, _, name in clips_of(entry)]
        if input_ids is None or any(code is None for code in codes):
            raise PipelineError(f"entry {index}: upstream refuses it, or its codes were lost; start again")
        codes = [torch.tensor(code, dtype=torch.long) for code in codes]  # (num_codebooks, T)
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
