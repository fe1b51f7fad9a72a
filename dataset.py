"""Data: from a ChatML manifest, its clips and the codec to the micro-batches of one optimizer step."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import signal
import unicodedata
import warnings
from dataclasses import dataclass
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
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, NonNegativeInt, ValidationInfo
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PretrainedConfig, utils

# Special tokens, but for those of scenes and instructions, and surrogates, which UTF-8 does not have
NOT_TEXT = re.compile("<\\|(?!scene_desc_|generation_instruction_)[^|<>]*\\|>|[\ud800-\udfff]")
# A character that is seen: no blank, and no mark of a direction, as Arabic texts have them
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\xad\u034f\u061c\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e007f]"
)
CLIP_NAME = re.compile(r"\s*\S+\.(wav|mp3|flac|ogg|opus|m4a|aac|webm|wma|aiff?)(\?\S*)?\s*", re.IGNORECASE)
PLAIN_WORDS = {  # for types of error where pydantic's own words say too little
    "extra_forbidden": "unknown key",
    "model_attributes_type": "expected text, or an object with text or audio_url",
    "none_required": "inference reads whole files: cut the clip and remove this key",
}
# In libsndfile's log: a size that a header tells, and the true one
SIZES = re.compile(r"(?i)^ *(?:rif[fx]|riff size|form|data|data size) *: +(\d+) \(should be (\d+)\)", re.M)
# The first bytes of a file, and of an mp3's frame: seen again later, the file is several files joined
STARTS = {"OGG": b"OggS\0\2", "FLAC": b'fLaC\0\0\0"', "RF64": b"WAVEds64"}
STARTS |= dict.fromkeys(("WAV", "WAVEX"), b"WAVEfmt ")
FRAME = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")
# The frame of an mp3 that tells its length, which is a guess without it
XING = re.compile(FRAME.pattern + rb".{11,34}(?:Xing|Info)", re.S)
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
    lines = [f"  {where}: {what}" for where, what in problems[:20]]
    if len(problems) > 20:
        lines.append(f"  ... and {len(problems) - 20} more")
    if problems:
        raise UserError("\n".join([f"{source}: {len(problems)} problem(s)", *lines]))


def build_object(pairs: list[tuple]) -> dict:
    """Build a JSON object. A repeated key's value becomes a tuple, which the schema refuses by its place."""
    values = {}
    for key, value in pairs:
        values[key] = ("given twice", values[key], value) if key in values else value
    return values


def read_entries(path: Path) -> list:
    """Read a JSON array, or objects one after another: JSONL, or a single entry over several lines."""
    with user_error(f"manifest {path} cannot be read as UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder(object_pairs_hook=build_object)
    not_blank = re.compile(r"[^ \t\r\n]")
    entries, end = [], 0
    while start := not_blank.search(text, end):
        try:
            value, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError) as error:
            # An entry that was cut off seems to go on in the next line: say where it begins, too.
            line = text.count("\n", 0, start.start()) + 1
            what = f"is neither a JSON array nor JSONL: {error}, in what begins in line {line}"
            raise UserError(f"manifest {path} {what}") from error
        entries += value if isinstance(value, list) else [value]
    return entries


def check_text(text: str) -> str:
    """Refuse a text that would not be read as text."""
    if found := NOT_TEXT.search(text):
        raise ValueError(f"text holds {found[0]!r}, which would not be read as text: remove it")
    return text


def check_path(path: str, info: ValidationInfo) -> str:
    """Refuse a path without a file; info.context is the manifest's folder."""
    if path in ("", "placeholder"):  # upstream's marks for a clip that stands in raw_audio
        raise ValueError("save the clip as a file and give its path")
    if isfile(join(info.context, path)):
        return path
    message = "no such file, from the manifest's folder"
    for form in ("NFC", "NFD"):  # Two names can look the same and differ: macOS decomposes letters.
        if isfile(join(info.context, unicodedata.normalize(form, path))):
            message += f", but there is one if the name is written in Unicode's form {form}"
    raise ValueError(message)


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


class Schema(pydantic.BaseModel, extra="forbid", strict=True):
    """Upstream's ChatMLSample, less what upstream accepts but misreads."""


class Text(Schema):
    type: Literal["text"]
    text: Annotated[str, AfterValidator(check_text)]


class Clip(Schema):
    type: Literal["audio"]
    audio_url: Annotated[str, AfterValidator(check_path)]
    raw_audio: str | None = None
    offset: None = None
    duration: None = None
    row_id: int | None = None


Part = Annotated[Text | Clip, Field(discriminator="type")]


class Turn(Schema):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(list_parts)]
    recipient: Annotated[str, AfterValidator(check_text)] | None = None


class Entry(Schema):
    messages: list[Turn]
    start_index: NonNegativeInt | None = None
    speaker: JsonValue = None
    misc: JsonValue = None


def in_one_line(error: dict) -> str:
    """Say where in an entry pydantic found an error, what it expected and what it saw."""
    place = ""
    for step in error["loc"]:
        place += f"[{step}]" if isinstance(step, int) else f": {step}"
    what = PLAIN_WORDS.get(error["type"], error["msg"]).removeprefix("Value error, ")
    line = f"{place}: {what}; seen: {error['input']!r:.200}"
    return " ".join(line.split()).removeprefix(": ")


def check_entry(entry: Any, folder: str) -> list[str]:
    """What is wrong with an entry, a line each: its form or, if that is right, what it trains."""
    try:
        checked = Entry.model_validate(entry, context=folder)
    except pydantic.ValidationError as error:
        return [in_one_line(one) for one in error.errors()]
    start = checked.start_index or 0
    problems = []
    for i, turn in enumerate(checked.messages):
        texts = [part.text for part in turn.content if part.type == "text"]
        if any(CLIP_NAME.fullmatch(text) or isfile(join(folder, text)) for text in texts):
            what = f"a text is a file's name, give it as audio_url; seen: {texts!r:.200}"
            problems.append(f"messages[{i}]: {what}")
        elif turn.role != "assistant" or i < start:
            if turn.recipient:
                problems.append(f"messages[{i}]: only a trained turn may have a recipient: remove it")
        elif len(texts) == len(turn.content) and not VISIBLE.search("".join(texts)):
            problems.append(f"messages[{i}]: a trained turn needs a clip or words; seen: {texts!r:.200}")
    if all(turn.role != "assistant" for turn in checked.messages[start:]):
        problems.append(f"has no assistant turn at or after start_index {start}")
    return problems


def complete_in_place(entry: dict, folder: str) -> None:
    """Make contents lists and paths absolute. A ".." stays: after a symlink its meaning is the system's."""
    for turn in entry["messages"]:
        turn["content"] = list_parts(turn["content"])
        for part in turn["content"]:
            if part["type"] == "audio":
                part["audio_url"] = join(folder, part["audio_url"])


def load_manifest(path: Path) -> list[dict]:
    """Checked entries, contents as lists, paths absolute. One UserError lists all the bad ones."""
    entries = read_entries(path)
    if not entries:
        raise UserError(f"manifest {path} holds no entry; expected one or more")
    folder = str(path.absolute().parent)
    problems = []
    for i, entry in enumerate(entries):
        problems += [(f"entry {i}", what) for what in check_entry(entry, folder)]
    raise_if_any(path, problems)
    for entry in entries:
        complete_in_place(entry, folder)
    return entries


def clips_of(entry: dict) -> list[tuple]:
    """(role, path) of a loaded entry's clips, in order."""
    parts = [(turn["role"], part) for turn in entry["messages"] for part in turn["content"]]
    return [(role, part["audio_url"]) for role, part in parts if part["type"] == "audio"]


def texts_of(entry: dict) -> str:
    """All texts of a loaded entry, in order, with blanks between."""
    parts = [part for turn in entry["messages"] for part in turn["content"]]
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def codec_fingerprint(folder: Path) -> str:
    """sha256 of a codec's config and weights' checksums. Raises UserError where `folder` holds none.

    The last MB of 0.8 GB of weights is a zip's directory, with each tensor's checksum.
    """
    with user_error(f"--audio_tokenizer {folder}: no codec there"):
        content = (folder / "config.json").read_bytes()
        with open(folder / "model.pth", "rb") as weights:
            weights.seek(max(0, weights.seek(0, os.SEEK_END) - 2**20))
            content += str(weights.tell()).encode() + weights.read()
    return hashlib.sha256(content).hexdigest()


def hubert_revision() -> str:
    """The revision of HuBERT that the codec will load. Raises UserError where it has code of its own."""
    with user_error(f"{HUBERT}, which the codec loads, is not there: huggingface-cli download {HUBERT}"):
        settings, _ = PretrainedConfig.get_config_dict(HUBERT)
        code = settings.get("auto_map") or utils.find_adapter_config_file(HUBERT)
    if code:
        raise UserError(f"{HUBERT}, revision {settings['_commit_hash']}, would run code: {code}")
    return str(settings["_commit_hash"])


def check_cache(cache: Path) -> None:
    """Note HuBERT's revision in a cache of codes. Raises UserError where the cache has another revision's."""
    note, revision = cache / "hubert_revision", hubert_revision()
    with user_error(f"--code_cache {cache} cannot be written"):
        before = note.read_text() if note.exists() else revision
        note.write_text(before)
    if before != revision:
        raise UserError(
            f"--code_cache {cache} has codes by {HUBERT} {before}, now it is {revision}: choose another"
        )


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
    missing = [(path, file) for path, file in files.items() if not file.exists()]
    return sorted(missing, key=lambda clip: os.path.getsize(clip[0]), reverse=True)


def load_codec(folder: Path, device):
    """The codec, on `device`. Raises UserError where it cannot be loaded, or was never trained."""
    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
    with user_error(f"--audio_tokenizer {folder} cannot be loaded"):
        codec = load_higgs_audio_tokenizer(str(folder), device=str(device))
    if not all(buffer.all() for name, buffer in codec.named_buffers() if name.endswith("inited")):
        raise UserError(f"--audio_tokenizer {folder} has codebooks that were never trained")
    return codec


class Watched(io.BytesIO):
    """A file in memory; is_cut if it ended inside a read: libsndfile reads an mp3 frame by frame."""

    is_cut = False

    def readinto(self, buffer):
        count = super().readinto(buffer)
        # Reads of 4 bytes only look for the next frame
        self.is_cut |= 4 < len(buffer) > count > 0
        return count


def find_lack(sound: soundfile.SoundFile, log: str, data: Watched, samples: int) -> str | None:
    """What a clip lost in decoding, or None: libsndfile decodes what it can, and reports no error."""
    content, is_mp3 = data.getvalue(), "MPEG" in sound.subtype
    for told, there in SIZES.findall(log):
        if int(there) + 64 < int(told) < 1 << 30:  # writers miscount a header; a stream's size is 2 or 4 GB
            return f"only {there} of the {told} bytes that its header tells are there: fetch it again"
    if samples < sound.frames and (not is_mp3 or XING.search(content[: data.tell()])):
        return f"its header tells {sound.frames / sound.samplerate:.3f} s: fetch it again"
    if sound.format in STARTS and content.count(STARTS[sound.format]) > 1:
        return "it is several files joined: write it again, as wav"
    if sound.format == "OGG":
        page = content[content.rindex(b"OggS\0") :]  # flags at 5, the number of segments at 26, their sizes
        if len(page) < 27 or not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27:][: page[26]]):
            return "its last page is missing: fetch it again"
    rest = content[data.tell() :].split(b"APETAGEX")[0] if is_mp3 else b""  # that tag may hold a picture
    if len(FRAME.findall(rest)) > 2:  # the last two may be padding
        return f"{len(rest)} of its {len(content)} bytes follow: write it again, as wav"
    return "its last frame is cut: fetch it again" if is_mp3 and data.is_cut else None


def import_librosa() -> None:
    """Import what librosa imports late: where that fails, no clip is to blame. Raises UserError."""
    remedy = "where HOME is read-only, set NUMBA_CACHE_DIR to a folder that is not"
    with user_error(f"librosa cannot be imported; {remedy}"):
        _ = librosa.load, librosa.resample, librosa.effects.trim


def load_waveform(path: str, sample_rate: int) -> np.ndarray:
    """A clip as inference loads it: mono, float32 (samples,). Raises UserError for one that is not whole."""
    with user_error(f"{path}: cannot be decoded as sound; fetch it again, or write it again as wav"):
        sound, data = soundfile.SoundFile(path), Watched(Path(path).read_bytes())
        log = sound.extra_info
        source = soundfile.SoundFile(data) if "MPEG" in sound.subtype else sound
        wave, rate = librosa.load(source, sr=None)
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


def encode_clips(clips: list[tuple], entries: list[dict], codec, num_workers: int, show=True) -> None:
    """Write the codes of (path, file) pairs, each whole or not at all. Raises UserError for all bad clips."""

    def load(clip):
        try:
            return load_waveform(clip[0], codec.sampling_rate)
        except UserError as error:
            return str(error)

    import_librosa()
    problems, waves = {}, in_workers(load, clips, num_workers)
    bar = tqdm(waves, "encoding clips", len(clips), disable=not show)
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
    unheard = []
    for i, entry in enumerate(entries):
        if any(role != "assistant" for role, _ in clips_of(entry)):
            unheard.append(i)
    if unheard and setting == "false":
        told = f"{len(unheard)} entries do not hear their reference, from {unheard[0]} on"
        warnings.warn(told, stacklevel=2)
    elif unheard and not heard:
        problem = "its reference never reaches this base; give it in an earlier assistant turn"
        raise_if_any("encode_audio_in_tokens is false", [(f"entry {i}", problem) for i in unheard])
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
        samples = sorted(map(self.load_sample, indices), key=lambda pair: pair[0], reverse=True)
        all_lengths = [length for length, _ in samples]
        micro_batches = []
        for cut in split_into_micro_batches(all_lengths, self.max_tokens, self.batch_size):
            lengths, chosen = zip(*samples[cut.start : cut.stop], strict=True)
            batch = vars(self.collator(list(chosen)))
            counts = np.zeros(1 + self.collator.audio_num_codebooks + 2, np.int64)
            counts[-2:] = sum(lengths), len(lengths) * lengths[0]
            for k, labels in enumerate([batch["label_ids"], *batch["label_audio_ids"]]):  # (B, T), (A,) each
                counts[k] = (labels[..., 1:] != -100).sum()
            arrays = {name: x.numpy() if torch.is_tensor(x) else x for name, x in batch.items()}
            micro_batches.append((arrays, counts))
        return micro_batches

    def load_sample(self, index: int) -> tuple[int, ChatMLDatasetSample]:
        """(positions, sample) of an entry, made anew each time: the collator overwrites its labels."""
        entry = {key: self.entries[index].get(key) for key in ("messages", "start_index")}
        input_ids, label_ids, _, _ = prepare_chatml_sample(entry, self.tokenizer)
        if input_ids is None:
            raise UserError(f"entry {index}: upstream refuses it, as printed above")
        clips, num_codebooks = clips_of(entry), self.collator.audio_num_codebooks
        codes = [torch.tensor(load_codes(self.code_files[path])).long() for _, path in clips]  # (K, T) each
        columns, nothing = [code.shape[1] for code in codes], torch.zeros(0, dtype=torch.long)
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
    roles = ("assistant", "user", "system") if data.collator.return_audio_in_tokens else ("assistant",)
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
    start = step * samples_per_step
    epochs = range(start // num_samples, (start + samples_per_step - 1) // num_samples + 1)
    orders = [np.random.default_rng((seed, epoch)).permutation(num_samples) for epoch in epochs]
    return np.concatenate(orders)[start - epochs[0] * num_samples :][:samples_per_step].tolist()


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


def split_into_micro_batches(lengths: list[int], max_tokens: int | None, batch_size: int) -> list[range]:
    """The cheapest cut of a rank's samples, the longest first, into micro-batches of neighbours.

    A micro-batch has at most max_tokens positions with padding, or one sample; without max_tokens, it has
    batch_size samples. By dynamic programming over the first 1, 2, 3, ... samples.
    """
    if not max_tokens:
        starts = range(0, len(lengths), batch_size)
        return [range(start, min(start + batch_size, len(lengths))) for start in starts]
    costs, cuts = [0], [[]]  # the cheapest cut of the first 0, 1, 2, ... samples
    for end in range(1, len(lengths) + 1):
        choices = []
        for start in range(end - 1, -1, -1):
            positions = (end - start) * lengths[start]
            if positions > max_tokens and choices:
                break  # with one more sample it has even more
            choices.append((costs[start] + max(LOWEST_COST, positions), start))
        cost, start = min(choices)
        costs.append(cost)
        cuts.append([*cuts[start], range(start, end)])
    return cuts[-1]
