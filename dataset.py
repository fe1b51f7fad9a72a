"""Data: from a ChatML manifest, its clips and the codec to one step's micro-batches.
load_manifest, find_clips, encode_clips, measure; deal_steps -> StepDataset (sample, cut, collate)
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections import namedtuple
from pickle import UnpicklingError

import dacite
import librosa
import numpy as np
import torch
from audioread import DecodeError
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.data_types import AudioContent, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PretrainedConfig, utils

# What becomes structure in a text (scene and instruction marks may); lone surrogates are no text
NOT_TEXT = re.compile("<\\|(?!scene_desc_|generation_instruction_)[^|<>]*\\|>|[\ud800-\udfff]")
FILE_ERRORS = (  # what libraries raised on missing, damaged and foreign files
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    SyntaxError,
    UnpicklingError,
    DecodeError,
    librosa.LibrosaError,
    SafetensorError,
)
is_file = functools.cache(os.path.isfile)
well_typed = set()  # (class, names and types of fields) that dacite took: it takes 15 us
# Of a micro-batch or step. labels: (1 + num_codebooks,), of the text, then each codebook
Counts = namedtuple("Counts", "labels samples positions padded_positions")


class PipelineError(Exception):
    """The user's input is at fault: says where, what was seen and what to do."""


@contextlib.contextmanager
def blaming(what):
    """Turn what libraries raise on unfit files into a PipelineError."""
    try:
        yield
    except FILE_ERRORS as error:
        raise PipelineError(f"{what} ({type(error).__name__}: {error})") from None


def refuse(source, problems):
    """Raise one PipelineError for all `problems`, [(where, what)], if there are any."""
    lines = [f"  {where}: {what}" for where, what in problems[:20]]
    if len(problems) > 20:
        lines.append(f"  ... and {len(problems) - 20} more")
    if problems:
        raise PipelineError("\n".join([f"{source}: {len(problems)} problem(s)", *lines]))


def load_manifest(path):
    """Entries, contents as lists, paths absolute. Refuses all bad ones at once."""
    with blaming(f"manifest {path} cannot be read as UTF-8 with a JSON array, or JSONL"):
        text = path.read_text(encoding="utf-8-sig").strip()
        if text.startswith("{"):  # splitlines() would also split at U+2028
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        entries = json.loads(text or "[]")
    if not isinstance(entries, list) or not entries:
        raise PipelineError(f"manifest {path} holds no entry; expected one or more")
    folder = path.absolute().parent
    refuse(path, [(f"entry {i}", what) for i, e in enumerate(entries) for what in check_entry(e, folder)])
    return entries


def check_entry(entry, folder):
    """Yield what is wrong with an entry, above all what upstream takes wrongly."""
    if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
        yield 'is not ChatML; expected {"messages": [{"role": ..., "content": ...}, ...]}'
        return
    start = 0 if entry.get("start_index") is None else entry["start_index"]
    if type(start) is not int or start < 0:
        yield f'"start_index" is {start!r}; expected null or the first turn to train'
        return
    for i, turn in enumerate(entry["messages"]):
        for what in check_turn(turn, i < start, folder):
            yield f"messages[{i}]: {what}"
    roles = [turn.get("role") for turn in entry["messages"][start:] if isinstance(turn, dict)]
    if "assistant" not in roles:
        yield f"has no assistant turn at or after start_index {start}"


def check_turn(turn, masked, folder):
    """Yield what is wrong with a message; `masked`: before start_index, without loss."""
    if problem := mistyped(Message, {**turn, "content": ""} if isinstance(turn, dict) else turn):
        yield problem
        return
    content, recipient = turn.get("content"), turn.get("recipient") or ""
    parts = content if isinstance(content, list) else [content]
    turn["content"] = [{"text": part} if isinstance(part, str) else part for part in parts]
    for part in [*turn["content"], {"text": recipient}]:
        yield from check_part(part, folder)
    if turn["role"] not in ("system", "user", "assistant"):
        yield f"role is {turn['role']!r}; expected system, user or assistant"
    if recipient and (masked or turn["role"] != "assistant"):
        yield "a recipient belongs to assistant turns at or after start_index; remove it"


def check_part(part, folder):
    """Yield what is wrong with one text or clip; makes a clip's path absolute."""
    kind = "text" if isinstance(part, dict) and "text" in part else "audio"
    if problem := mistyped(TextContent if kind == "text" else AudioContent, part):
        yield problem
    elif part.get("type", kind) != kind:
        yield f"content of type {part['type']!r} has the fields of {kind}"
    elif kind == "text":
        if found := NOT_TEXT.search(part["text"]):
            yield f"text holds {found[0]!r}, which would not be read as text; remove it"
    elif part["audio_url"] in ("placeholder", ""):  # upstream's for "see raw_audio"
        yield f"audio_url is {part['audio_url']!r}; save the clip as a file and give its path"
    elif part.get("offset") is not None:
        yield f"{part['audio_url']}: has an offset; inference reads whole files: cut it"
    else:
        if "://" not in part["audio_url"]:
            part["audio_url"] = os.path.abspath(os.path.join(folder, part["audio_url"]))
        if not is_file(part["audio_url"]):
            yield f"{part['audio_url']}: no such file, from the manifest's folder"


def mistyped(kind, value):
    """What dacite, which upstream uses, has against `value` as a `kind`; or None."""
    if not isinstance(value, dict):
        return f"{str(value)[:80]!r} is no {kind.__name__}; expected text or an object"
    types = kind, *((name, type(field)) for name, field in value.items())
    if types not in well_typed:
        try:
            dacite.from_dict(kind, value, dacite.Config(strict=True))
        except dacite.DaciteError as error:
            return f"{str(value)[:80]!r} is no {kind.__name__}: {error}"
        well_typed.add(types)
    return None


def clips_of(entry):
    """[(role, path)] of a checked entry's clips, in order."""
    parts = [(turn["role"], part) for turn in entry["messages"] for part in turn["content"]]
    return [(role, part["audio_url"]) for role, part in parts if "text" not in part]


def find_clips(entries, cache, fingerprint):
    """{path: file of its codes}; a clip that changes gets another file."""
    clips = {}
    for path in dict.fromkeys(path for entry in entries for _, path in clips_of(entry)):
        status = os.stat(path)
        identity = [fingerprint, os.path.realpath(path), status.st_size, status.st_mtime_ns]
        clips[path] = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.npy"
    return clips


def load_codes(file):
    """One clip's codes, int16 (num_codebooks, T). PipelineError: lost or damaged."""
    with blaming(f"codes {file} are damaged: remove them; or not on this node: share a --code_cache"):
        return np.load(file, mmap_mode="r")


def find_missing(clips):
    """[(path, file)] of the clips whose codes are not in the cache, largest first."""
    missing = [(path, file) for path, file in clips.items() if not file.exists()]
    return sorted(missing, key=lambda clip: os.path.getsize(clip[0]), reverse=True)


def load_codec(folder, device):
    """Load the codec onto `device`. PipelineError where that fails."""
    hubert = "bosonai/hubert_base"  # its class loads that, with trust_remote_code=True
    with blaming(f"--audio_tokenizer {folder}, HuBERT (huggingface-cli download {hubert}) cannot be loaded"):
        settings, _ = PretrainedConfig.get_config_dict(hubert)
        if "auto_map" in settings or utils.find_adapter_config_file(hubert):
            raise PipelineError(
                f"{hubert}, revision {settings['_commit_hash']}, would run code: auto_map "
                f"is {settings.get('auto_map', 'in its adapter_config.json')}; expected none"
            )
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        codec = load_higgs_audio_tokenizer(str(folder), device=str(device))
    if not all(buffer.all() for name, buffer in codec.named_buffers() if name.endswith("inited")):
        raise PipelineError(f"--audio_tokenizer {folder} has codebooks that were never trained")
    return codec


def load_waveform(path, sample_rate):
    """Mono float32 (samples,), as inference loads it. PipelineError: unfit."""
    with blaming(f"{path}: cannot be decoded as sound; write it again, as wav"):
        wave, _ = librosa.load(path, sr=sample_rate)
    if len(wave) < 0.1 * sample_rate:  # the codec's convolutions fail
        raise PipelineError(f"{path}: lasts {len(wave) / sample_rate:.3f} s; the codec needs at least 0.1 s")
    return wave


def encode_clips(clips, entries, codec, show):
    """Write codes of [(path, file)], each whole or not at all. Refuses all bad clips."""
    problems = {}
    for path, file in tqdm(clips, "encoding clips", disable=not show):
        try:
            wave = load_waveform(path, codec.sampling_rate)
        except PipelineError as error:
            problems[path] = error
            continue
        # One clip at a time: padding a batch of clips changes their codes
        codes = codec.encode(wave, codec.sampling_rate)  # (num_codebooks, T)
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        with blaming(f"--code_cache {file.parent} cannot be written"):
            with open(unfinished, "wb") as stream:
                np.save(stream, codes.squeeze(0).cpu().numpy().astype(np.int16))
            unfinished.rename(file)
    refuse(
        "clips",
        [
            (f"entry {i}", problems[path])
            for i, entry in enumerate(entries)
            for path in {clip for _, clip in clips_of(entry)} & problems.keys()
        ],
    )


def build_collator(entries, config, setting):
    """serve_engine.py's, but for return_audio_in_tokens; refuses references not heard."""
    as_codes = config.encode_audio_in_tokens if setting == "auto" else setting == "true"
    heard = ["assistant", "user", "system"] if as_codes and config.encode_audio_in_tokens else ["assistant"]
    deaf = [
        f"entry {i}"
        for i, entry in enumerate(entries)
        if any(role not in heard for role, _ in clips_of(entry))
    ]
    if deaf and setting == "false":
        warnings.warn(f"{len(deaf)} entries train deaf, the first is {deaf[0]}", stacklevel=2)
    else:
        refuse(
            f"encode_audio_in_tokens {config.encode_audio_in_tokens}, --return_audio_in_tokens {setting}",
            [(entry, "its reference never reaches the model; use an earlier reply") for entry in deaf],
        )
    return HiggsAudioSampleCollator(
        whisper_processor=None,
        encode_whisper_embed=config.encode_whisper_embed,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        pad_token_id=config.pad_token_id,
        return_audio_in_tokens=as_codes,
        round_to=1,
        use_delay_pattern=config.use_delay_pattern,
        audio_num_codebooks=config.audio_num_codebooks,
    )


def add_up(counts):
    """The Counts of several micro-batches, or steps, together."""
    return Counts(*(sum(column) for column in zip(*counts, strict=True)))


class StepDataset:
    """An item is a rank's share of a step: micro-batches, [(batch, Counts), ...]."""

    def __init__(self, entries, clips, tokenizer, collator, batch_size, max_tokens):
        self.entries, self.clips, self.tokenizer = entries, clips, tokenizer
        self.collator, self.batch_size, self.max_tokens = collator, batch_size, max_tokens

    def __getitem__(self, share):
        indices, trained = share
        micro_batches = cut(map(self.sample, indices), self.batch_size, self.max_tokens)
        return [self.collate(*zip(*samples, strict=True), trained) for samples in micro_batches]

    def sample(self, index):
        """(positions, sample) of one entry, afresh: the collator leaves marks in it."""
        entry = {key: self.entries[index].get(key) for key in ("messages", "start_index")}
        input_ids, label_ids, _, _ = prepare_chatml_sample(entry, self.tokenizer)
        if input_ids is None:
            raise PipelineError(f"entry {index}: upstream refuses it, as printed above")
        codes = [torch.tensor(load_codes(self.clips[path]), dtype=torch.long) for _, path in clips_of(entry)]
        starts = torch.tensor([0, *(code.shape[1] for code in codes)]).cumsum(0)[:-1]  # (clips,)
        sample = ChatMLDatasetSample(
            input_ids=torch.LongTensor(input_ids),
            label_ids=torch.LongTensor(label_ids),
            audio_ids_concat=torch.cat(codes, dim=1) if codes else torch.zeros(8, 0),  # (num_codebooks, T)
            audio_ids_start=starts,
            audio_waveforms_concat=torch.zeros(0),
            audio_waveforms_start=starts[:0],
            audio_sample_rate=torch.zeros(0),
            audio_speaker_indices=None,
        )
        tokens = self.collator.audio_in_token_id, self.collator.audio_out_token_id
        length = sample.cal_num_tokens(False, self.collator.return_audio_in_tokens, True, *tokens)
        length += len(codes) * (self.collator.audio_num_codebooks + 1)  # BOS, EOS, delay: not in it
        return -(-length // 8) * 8, sample  # upstream pads to a multiple of 8

    def collate(self, lengths, samples, trained):
        batch = vars(self.collator(list(samples)))  # pin_memory ignores dataclasses
        labels = torch.zeros(self.collator.audio_num_codebooks + 1, dtype=torch.long)
        for k, label in enumerate([batch["label_ids"], *batch["label_audio_ids"]]):  # (B, T), 8 x (A,)
            if not trained:
                label.fill_(-100)
            labels[k] = (label[..., 1:] != -100).sum()
        return batch, Counts(labels, len(samples) if trained else 0, sum(lengths), len(samples) * lengths[0])


def measure(data):
    """Positions of each entry of a StepDataset, estimated: to tokenize one takes 1 ms."""
    shapes = {path: load_codes(file).shape for path, file in data.clips.items()}
    if {shape[0] for shape in shapes.values()} - {data.collator.audio_num_codebooks}:
        raise PipelineError("--audio_tokenizer and --base_ckpt differ in codebooks")
    sizes, columns = [], []  # bytes of text, with 20 for marks; codes
    for entry in data.entries:
        texts = [part.get("text", "") for turn in entry["messages"] for part in turn["content"]]
        sizes.append(20 * len(entry["messages"]) + sum(len(text.encode()) for text in texts))
        columns.append(
            sum(
                shapes[path][1] + 9
                for role, path in clips_of(entry)
                if role == "assistant" or data.collator.return_audio_in_tokens
            )
        )
    some = range(0, len(sizes), 1 + len(sizes) // 50)  # 50 entries tell tokens a byte
    rate = sum(data.sample(i)[0] - columns[i] for i in some) / sum(sizes[i] for i in some)
    return [round(rate * size) + audio for size, audio in zip(sizes, columns, strict=True)]


def deal_steps(lengths, samples_per_step, seed, world_size, steps):
    """Yield all ranks' shares, [(indices, trained), ...], of each of `steps`, a range.

    An epoch is a permutation by (seed, epoch), cut; samples go, longest first, to the idlest rank.
    """
    for step in steps:
        epoch, position = divmod(step, -(-len(lengths) // samples_per_step))
        if position == 0 or step == steps[0]:
            order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
        samples = order[position * samples_per_step :][:samples_per_step].tolist()
        samples.sort(key=lambda sample: -lengths[sample])
        shares, loads = [[] for _ in range(world_size)], [0] * world_size
        for sample in samples:
            lightest = loads.index(min(loads))
            shares[lightest].append(sample)
            loads[lightest] += lengths[sample]
        yield [(share, True) if share else (samples[-1:], False) for share in shares]  # none runs idle


def cut(samples, batch_size, max_tokens):
    """Cut (positions, sample) pairs into micro-batches, the longest first."""
    micro_batches, room = [], 0
    for length, sample in sorted(samples, key=lambda pair: -pair[0]):
        if not micro_batches or len(micro_batches[-1]) == room:
            micro_batches.append([])
            room = max(1, max_tokens // length) if max_tokens else batch_size
        micro_batches[-1].append((length, sample))
    return micro_batches
