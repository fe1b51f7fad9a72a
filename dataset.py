"""Data: from a ChatML manifest, its clips and the codec to the micro-batches of one optimizer step."""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import tempfile
import unicodedata
import warnings
from dataclasses import dataclass
from io import BytesIO
from os.path import isfile, join
from pathlib import Path
from typing import Annotated, Any, Literal

import librosa
import numpy as np
import pydantic
import soundfile
import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from pydantic import AfterValidator, BeforeValidator, JsonValue, NonNegativeInt
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PretrainedConfig, utils

# Librosa compiles on its first use; beside its own files that fails where they, or HOME, are read-only
os.environ.setdefault("NUMBA_CACHE_DIR", join(tempfile.gettempdir(), f"numba-{os.getuid()}"))
# Special tokens, but for those of scenes and instructions, and surrogates, which UTF-8 does not have
NOT_TEXT = re.compile("<\\|(?!scene_desc_|generation_instruction_)[^|<>]*\\|>|[\ud800-\udfff]")
CLIP_NAME = re.compile(r"\s*\S+\.(wav|mp3|flac|ogg|opus|m4a|aac|webm|wma|aiff?)(\?\S*)?\s*", re.IGNORECASE)
PLAIN_WORDS = {  # where pydantic's own words say too little
    "extra_forbidden": "unknown key",
    "model_attributes_type": "expected text, or an object with text or audio_url",
    "none_required": "inference reads whole files: cut or save the clip, and remove this key",
}
# The first bytes of a file, and of an mp3's frame: seen again later, the file is several files joined
STARTS = {"OGG": b"OggS\0\2", "FLAC": b"fLaC\0\0\0", "WAV": b"WAVEfmt ", "WAVEX": b"WAVEfmt "}
MP3_FRAME = rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"
HUBERT = "bosonai/hubert_base"  # HiggsAudioTokenizer loads it, with trust_remote_code=True
# To launch a micro-batch's kernels takes 0.1 s, however small it is: an H100's time for 2,000 positions
LOWEST_COST = 2_000


class UserError(Exception):
    """The user's input is at fault: the message says where, what was seen and what to do."""


@contextlib.contextmanager
def user_error(message: str):
    """Turn what a library raises on a user's file into a UserError. Stands around single calls only."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from error


def raise_if_any(source, problems: list[tuple]) -> None:
    """Raise one UserError for all `problems`, pairs (where, what), if there are any."""
    lines = []
    for where, what in problems[:20]:
        lines.append("  " + " ".join(f"{where}: {what}".split()))  # in one line
    if len(problems) > 20:
        lines.append(f"  ... and {len(problems) - 20} more")
    if problems:
        raise UserError("\n".join([f"{source}: {len(problems)} problem(s)", *lines]))


def list_parts(content: Any) -> list:
    """Make a content a list of objects with a type. ChatML also takes strings, one object, and no type."""
    parts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            part = {"text": part}
        if isinstance(part, dict):
            part = {"type": "text" if "text" in part else "audio", **part}
        parts.append(part)
    return parts


def check_text(text: str) -> str:
    """Refuse a text that would not be read as text."""
    if found := NOT_TEXT.search(text):
        raise ValueError(f"text holds {found[0]!r}, which would not be read as text: remove it")
    return text


class Text(pydantic.BaseModel, extra="forbid", strict=True):
    type: Literal["text"]
    text: Annotated[str, AfterValidator(check_text)]

    @pydantic.field_validator("text")
    def check(cls, text: str, info) -> str:
        if CLIP_NAME.fullmatch(text) or isfile(join(info.context, text)):
            raise ValueError("a text is a file's name: give it as audio_url")
        return text


class Clip(pydantic.BaseModel, extra="forbid", strict=True):
    type: Literal["audio"]
    audio_url: str
    raw_audio: None = None
    offset: None = None
    duration: None = None
    row_id: int | None = None

    @pydantic.field_validator("audio_url")
    def complete(cls, path: str, info) -> str:
        folder, remedy = info.context, ""
        for form in ("NFC", "NFD"):  # Two names can look the same and differ: macOS decomposes letters.
            if isfile(join(folder, unicodedata.normalize(form, path))):
                remedy = f", but there is one if the name is written in Unicode's form {form}"
        if not isfile(join(folder, path)):
            raise ValueError(f"no such file, from the manifest's folder{remedy}")
        return join(folder, path)  # With its "..": what that means after a link is the system's.


class Turn(pydantic.BaseModel, extra="forbid", strict=True):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[Text | Clip, pydantic.Field(discriminator="type")]], BeforeValidator(list_parts)
    ]
    recipient: Annotated[str, AfterValidator(check_text)] | None = None


class Entry(pydantic.BaseModel, extra="forbid", strict=True):
    """Upstream's ChatMLSample, less what upstream accepts but misreads."""

    messages: list[Turn]
    start_index: NonNegativeInt | None = None
    speaker: JsonValue = None
    misc: JsonValue = None

    @pydantic.model_validator(mode="after")
    def check(self):
        start, trains = self.start_index or 0, False
        for i, turn in enumerate(self.messages):
            is_trained = turn.role == "assistant" and i >= start
            is_filled = any(part.type == "audio" or re.search(r"\w", part.text) for part in turn.content)
            if is_trained and not is_filled:
                raise ValueError(f"messages[{i}]: a trained turn needs a clip or words")
            if turn.recipient and not is_trained:
                raise ValueError(f"messages[{i}]: only a trained turn may have a recipient: remove it")
            trains |= is_trained
        if not trains:
            raise ValueError(f"has no assistant turn at or after start_index {start}")
        return self


def build_object(pairs: list[tuple]) -> dict:
    """Build a JSON object. A repeated key's value becomes a tuple, which the schema refuses by its place."""
    values = {}
    for key, value in pairs:
        values[key] = ("given twice", values[key], value) if key in values else value
    return values


def load_manifest(path: Path) -> list[dict]:
    """Checked entries, contents as lists, paths absolute. One error lists all the bad ones.

    path: a JSON array, or objects in lines of their own (JSONL). Raises UserError.
    """
    with user_error(f"manifest {path} cannot be read as a JSON array or JSONL in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):  # JSONL: add the brackets and the commas between objects
            text = "[" + re.sub(r"\}(?=\s*\n\s*\{)", "},", text) + "]"
        raw_entries = json.loads(text or "[]", object_pairs_hook=build_object)
    if not isinstance(raw_entries, list) or not raw_entries:
        raise UserError(f"manifest {path} holds no entry; expected one or more")
    entries, problems, folder = [], [], str(path.absolute().parent)
    for i, entry in enumerate(raw_entries):
        try:
            entries.append(Entry.model_validate(entry, context=folder).model_dump(exclude_none=True))
        except pydantic.ValidationError as found:
            for error in found.errors():
                steps = [f"[{step}]" if isinstance(step, int) else f": {step}" for step in error["loc"]]
                what = PLAIN_WORDS.get(error["type"], error["msg"]).removeprefix("Value error, ")
                problems.append((f"entry {i}{''.join(steps)}", f"{what}; seen: {error['input']!r:.200}"))
    raise_if_any(path, problems)
    return entries


def clips_of(entry: dict) -> list[tuple[str, str]]:
    """(role, path) of a loaded entry's clips, in order."""
    clips = []
    for turn in entry["messages"]:
        for part in turn["content"]:
            if part["type"] == "audio":
                clips.append((turn["role"], part["audio_url"]))
    return clips


def texts_of(entry: dict) -> str:
    """All texts of a loaded entry, in order, with blanks between."""
    texts = []
    for turn in entry["messages"]:
        texts += [part["text"] for part in turn["content"] if part["type"] == "text"]
    return " ".join(texts)


def codec_fingerprint(folder: Path) -> str:
    """sha256 of all that codes depend on: the codec's files, and the revision of the HuBERT it loads.

    Raises UserError where one of them is missing, or where HuBERT would run code from the hub.
    """
    with user_error(f"{HUBERT}, which the codec loads, is not there: huggingface-cli download {HUBERT}"):
        settings, _ = PretrainedConfig.get_config_dict(HUBERT)
        code = settings.get("auto_map") or utils.find_adapter_config_file(HUBERT)
        revision = str(settings["_commit_hash"])
    if code:
        raise UserError(f"{HUBERT}, revision {revision}, would run code: {code}")
    with user_error(f"--audio_tokenizer {folder}: no codec there"):
        with open(folder / "model.pth", "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256")
        digest.update((folder / "config.json").read_bytes())
    digest.update(revision.encode())
    return digest.hexdigest()


def code_files(entries: list[dict], cache: Path, codec_id: str) -> dict[str, Path]:
    """{path of a clip: file of its codes}. A clip that changes, or another codec, gets another file."""
    with user_error(f"--code_cache {cache} cannot be made"):
        cache.mkdir(parents=True, exist_ok=True)
    files = {}
    for path in dict.fromkeys(path for entry in entries for _, path in clips_of(entry)):
        status = os.stat(path)
        identity = [codec_id, os.path.realpath(path), status.st_size, status.st_mtime_ns]
        files[path] = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.npy"
    return files


def find_missing(files: dict[str, Path]) -> list[tuple[str, Path]]:
    """(path, file) of the clips whose codes are not in the cache, the largest first."""
    missing = [clip for clip in files.items() if not clip[1].exists()]
    return sorted(missing, key=lambda clip: os.path.getsize(clip[0]), reverse=True)


def load_codec(folder: Path, device: torch.device | str):
    """The codec, on `device`. Raises UserError where it cannot be loaded, or was never trained."""
    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
    with user_error(f"--audio_tokenizer {folder} cannot be loaded"):
        codec = load_higgs_audio_tokenizer(str(folder), device=str(device))
    inited = [buffer for name, buffer in codec.named_buffers() if name.endswith("inited")]
    if not all(buffer.all() for buffer in inited):
        raise UserError(f"--audio_tokenizer {folder} has codebooks that were never trained")
    return codec


class Watched(BytesIO):
    """A file in memory; is_cut if it ended inside a read: libsndfile reads an mp3 frame by frame."""

    is_cut = False

    def readinto(self, buffer):
        count = super().readinto(buffer)
        # Reads of 4 bytes only look for the next frame
        self.is_cut |= 4 < len(buffer) > count > 0
        return count


def find_lack(sound: soundfile.SoundFile, log: str, data: Watched, samples: int) -> str | None:
    """What a clip lost in decoding, or None: libsndfile decodes what it can, and reports no error."""
    content, is_mp3 = data.getvalue(), sound.format == "MP3"
    if sizes := re.search(r"(\d+) \(should be (\d+)\)", log):
        told, there = int(sizes[1]), int(sizes[2])
        if there + 64 < told < 1 << 30:  # a header may count itself; that of a stream tells 2 or 4 GB
            return f"only {there} of the {told} bytes that its header tells are there: fetch it again"
    if samples < sound.frames and (not is_mp3 or re.search(b"Xing|Info", content)):  # else it is a guess
        return f"its header tells {sound.frames / sound.samplerate:.3f} s: fetch it again"
    if content.count(STARTS.get(sound.format, b"OggS\0\2")) > 1:
        return "it is several files joined: write it again, as wav"
    if sound.format == "OGG":
        page = content[content.rindex(b"OggS\0") :].ljust(27, b"\0")
        is_last, num_segments = page[5] & 4, page[26]
        if not is_last or len(page) < 27 + num_segments + sum(page[27 : 27 + num_segments]):
            return "its last page is missing: fetch it again"
    rest = content[data.tell() :].split(b"APETAGEX")[0]  # that tag may hold a picture
    if is_mp3 and len(re.findall(MP3_FRAME, rest)) > 2:  # the last two may be padding
        return f"{len(rest)} of its {len(content)} bytes follow: write it again, as wav"
    return "its last frame is cut: fetch it again" if is_mp3 and data.is_cut else None


def load_waveform(path: str, sample_rate: int) -> np.ndarray:
    """A clip as inference loads it: mono, float32 (samples,). Raises UserError: unfit, or not all of it."""
    with user_error(f"{path}: cannot be decoded as sound; fetch it again, or write it again as wav"):
        data = Watched(Path(path).read_bytes())
        sound = soundfile.SoundFile(data)
        log = sound.extra_info
        wave, rate = librosa.load(sound, sr=None)
        resampled = librosa.resample(wave, orig_sr=rate, target_sr=sample_rate)
    seconds = len(wave) / rate
    if lack := find_lack(sound, log, data, len(wave)):
        raise UserError(f"{path}: {seconds:.3f} s of it are decoded, but {lack}")
    if seconds < 0.1:  # the codec's convolutions fail
        raise UserError(f"{path}: lasts {seconds:.3f} s; the codec needs at least 0.1 s")
    return resampled


def ignore_signals(_) -> None:
    """In a DataLoader's worker: a signal reaches the whole process group, the main process decides."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def in_workers(function, items, num_workers: int):
    """Yield function(item) of each item, in order, computed ahead in worker processes.

    Let `function` return NumPy arrays: each tensor would keep a file open. Raises a worker's UserError, and
    RuntimeError ("DataLoader ...") where a worker dies or takes more than ten minutes for an item.
    """
    options = dict(num_workers=num_workers, worker_init_fn=ignore_signals)
    if num_workers:  # by fork: `function` may be a closure, which cannot be pickled
        options |= dict(timeout=600, multiprocessing_context="fork")
    with user_error("DataLoader workers cannot be started; is /dev/shm full? --num_workers 0 needs none"):
        results = iter(DataLoader(items, batch_size=None, collate_fn=function, **options))
    try:
        yield from results
    except UserError as error:  # its text is the worker's traceback, which ends in the message
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def encode_clips(clips: list[tuple], entries: list[dict], codec, num_workers: int) -> None:
    """Write the codes of (path, file) pairs, each whole or not at all. Raises UserError for all bad clips."""

    def load(clip):
        try:
            return load_waveform(clip[0], codec.sampling_rate)
        except UserError as error:
            return str(error)

    problems, waves = {}, in_workers(load, clips, num_workers)
    is_first_rank = os.environ.get("RANK", "0") == "0"
    bar = tqdm(waves, "encoding clips", len(clips), disable=not is_first_rank)
    for (path, file), wave in zip(clips, bar, strict=True):
        if isinstance(wave, str):
            problems[path] = wave
            continue
        try:  # one clip at a time: padding a batch of clips changes their codes
            codes = codec.encode(wave, codec.sampling_rate).squeeze(0)  # (num_codebooks, T)
        except torch.OutOfMemoryError:
            seconds = len(wave) / codec.sampling_rate
            problems[path] = f"{path}: its {seconds:.0f} s do not fit this GPU; cut it"
            continue
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        with user_error(f"--code_cache {file.parent} cannot be written"):
            with open(unfinished, "wb") as stream:
                np.save(stream, codes.cpu().numpy().astype(np.int16))
            unfinished.rename(file)
    bad = []
    for i, entry in enumerate(entries):
        for path in {path for _, path in clips_of(entry)} & problems.keys():
            bad.append((f"entry {i}", problems[path]))
    raise_if_any("clips", bad)


def load_codes(file: Path) -> np.ndarray:
    """One clip's codes, int16 (num_codebooks, T). Raises UserError where they are lost or damaged."""
    with user_error(f"codes {file} are damaged: remove them; or not on this node: share a --code_cache"):
        return np.load(file, mmap_mode="r")


def build_collator(entries: list[dict], config, setting: str) -> HiggsAudioSampleCollator:
    """serve_engine.py's collator, but return_audio_in_tokens is the config's, or false.

    Raises UserError where a reference in a user or system turn would never reach the base.
    """
    heard = bool(config.encode_audio_in_tokens and setting == "auto")
    if not heard:
        unheard = []
        for i, entry in enumerate(entries):
            if any(role != "assistant" for role, _ in clips_of(entry)):
                problem = "its reference never reaches this base; give it in an earlier assistant turn"
                unheard.append((f"entry {i}", problem))
        if setting == "auto":
            raise_if_any("encode_audio_in_tokens is false in --base_ckpt", unheard)
        elif unheard:
            warnings.warn(
                f"{len(unheard)} entries do not hear their reference: {unheard[0][0]} ...", stacklevel=2
            )
    return HiggsAudioSampleCollator(
        whisper_processor=None,
        encode_whisper_embed=config.encode_whisper_embed,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        pad_token_id=config.pad_token_id,
        return_audio_in_tokens=heard,
        use_delay_pattern=config.use_delay_pattern,
        round_to=1,
        audio_num_codebooks=config.audio_num_codebooks,
    )


@dataclass
class StepDataset:
    """data[indices] is one rank's share of an optimizer step, a list of micro-batches (batch, counts).

    batch: HiggsAudioModel.forward's keyword arguments, NumPy arrays. counts (1 + num_codebooks + 2,): labels
    of the text and of each codebook, positions without and with padding.
    """

    entries: list[dict]
    code_files: dict[str, Path]
    tokenizer: Any
    collator: HiggsAudioSampleCollator
    batch_size: int
    max_tokens: int | None

    def __getitem__(self, indices: list[int]) -> list[tuple[dict, np.ndarray]]:
        pairs = sorted(map(self.load_sample, indices), key=lambda pair: pair[0], reverse=True)
        lengths, samples = zip(*pairs, strict=True)
        micro_batches = []
        for cut in split_into_micro_batches(lengths, self.max_tokens, self.batch_size):
            batch = vars(self.collator(list(samples[cut])))
            counts = np.zeros(1 + self.collator.audio_num_codebooks + 2, np.int64)
            counts[-2:] = sum(lengths[cut]), len(lengths[cut]) * lengths[cut.start]
            for k, labels in enumerate([batch["label_ids"], *batch["label_audio_ids"]]):  # (B, T), (A,) each
                counts[k] = (labels[..., 1:] != -100).sum()
            arrays = {name: x.numpy() if torch.is_tensor(x) else x for name, x in batch.items()}
            micro_batches.append((arrays, counts))
        return micro_batches

    def load_sample(self, index: int) -> tuple[int, ChatMLDatasetSample]:
        """(positions, sample) of an entry, made anew each time: the collator overwrites its labels."""
        raw = self.entries[index]
        entry = {"messages": raw["messages"], "start_index": raw.get("start_index")}
        input_ids, label_ids, _, _ = prepare_chatml_sample(entry, self.tokenizer)
        if input_ids is None:
            raise UserError(f"entry {index}: upstream refuses it, as printed above")
        nothing, num_codebooks = torch.zeros(0, dtype=torch.long), self.collator.audio_num_codebooks
        clips = clips_of(entry)
        files = [self.code_files[path] for _, path in clips]
        codes = [torch.tensor(load_codes(file)).long() for file in files]  # (num_codebooks, T) each
        columns = [code.shape[1] for code in codes]
        sample = ChatMLDatasetSample(
            input_ids=torch.LongTensor(input_ids),
            label_ids=torch.LongTensor(label_ids),
            audio_ids_concat=torch.cat([nothing.expand(num_codebooks, 0), *codes], dim=1),
            audio_ids_start=torch.tensor([0, *columns]).cumsum(0)[:-1],  # (clips,)
            audio_waveforms_concat=nothing,
            audio_waveforms_start=nothing,
            audio_sample_rate=nothing,
            audio_speaker_indices=None,
        )
        placeholders = self.collator.audio_in_token_id, self.collator.audio_out_token_id
        length = sample.cal_num_tokens(False, self.collator.return_audio_in_tokens, True, *placeholders)
        heard = [role for role, _ in clips if role == "assistant" or self.collator.return_audio_in_tokens]
        length += len(heard) * (num_codebooks + 1)  # it leaves out BOS, EOS and the delay
        return math.ceil(length / 8) * 8, sample  # upstream pads to a multiple of 8


def to_tensors(batch: dict, device: torch.device) -> dict:
    """A batch's NumPy arrays as tensors on `device`; to a GPU through pinned memory, without a wait."""
    tensors = dict(batch)
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(value)
            if device.type == "cuda":
                tensors[name] = tensors[name].pin_memory().to(device, non_blocking=True)
    return tensors


def estimate_lengths(data: StepDataset) -> list[int]:
    """Positions of each entry, to plan with: its codes, and a token for 3 bytes of text.

    Raises UserError where the codes are not of the base's codebooks.
    """
    columns, end = {}, data.collator.audio_stream_bos_id  # the codes are 0 ... end - 1
    for path, file in data.code_files.items():
        codes = load_codes(file)
        if len(codes) != data.collator.audio_num_codebooks or codes.max(initial=0) >= end:
            raise UserError(
                f"--audio_tokenizer and --base_ckpt differ in codebooks: {path} has {len(codes)}, codes to "
                f"{codes.max(initial=0)}; the base has {data.collator.audio_num_codebooks}, codes below {end}"
            )
        columns[path] = codes.shape[1] + len(codes) + 1  # BOS, EOS, delay
    roles = {"assistant", "user", "system"} if data.collator.return_audio_in_tokens else {"assistant"}
    lengths = []
    for entry in data.entries:
        heard = sum(columns[path] for role, path in clips_of(entry) if role in roles)
        text = len(texts_of(entry).encode()) // 3
        lengths.append(heard + text + 6 * len(entry["messages"]))
    return lengths


def samples_of_step(step: int, num_samples: int, samples_per_step: int, seed: int) -> list[int]:
    """Indices of the samples of an optimizer step, over all ranks.

    A run is one stream of samples, a permutation by (seed, epoch) for each epoch; each step takes the next.
    """
    stream = range(step * samples_per_step, (step + 1) * samples_per_step)
    epochs = range(stream[0] // num_samples, stream[-1] // num_samples + 1)
    orders = [np.random.default_rng((seed, epoch)).permutation(num_samples) for epoch in epochs]
    start = epochs[0] * num_samples
    return np.concatenate(orders)[stream[0] - start :][:samples_per_step].tolist()


def split_over_ranks(samples: list[int], lengths: list[int], world_size: int) -> list[list[int]]:
    """Each rank's samples of a step: neighbours by length, of about as many positions as any other rank's.

    `lengths` holds the positions of every entry of the manifest. The longest samples go to rank 0.
    """
    total, before, rank = sum(lengths[sample] for sample in samples), 0, -1
    shares = [[] for _ in range(world_size)]
    for sample in sorted(samples, key=lambda sample: lengths[sample], reverse=True):
        balanced = math.floor((before + lengths[sample] / 2) * world_size / total)
        rank = min(balanced, rank + 1)  # skips no rank; as the longest come first, none stays empty
        shares[rank].append(sample)
        before += lengths[sample]
    return shares


def split_into_micro_batches(lengths: list[int], max_tokens: int | None, batch_size: int) -> list[slice]:
    """The cheapest cut of a rank's samples, the longest first, into micro-batches of neighbours.

    A micro-batch has at most max_tokens positions with padding, or one sample; if max_tokens is 0, it has
    batch_size samples. By dynamic programming over the first 1, 2, 3, ... samples.
    """
    if not max_tokens:
        starts = range(0, len(lengths), batch_size)
        return [slice(start, start + batch_size) for start in starts]
    best = [(0, [])]  # (cost, cuts) of the first 0, 1, 2, ... samples
    for end in range(1, len(lengths) + 1):
        choices = []
        for start in range(end - 1, -1, -1):
            positions = (end - start) * lengths[start]
            if positions > max_tokens and choices:
                break  # with one more sample it has even more
            choices.append((best[start][0] + max(LOWEST_COST, positions), start))
        cost, start = min(choices)
        best.append((cost, [*best[start][1], slice(start, end)]))
    return best[-1][1]
