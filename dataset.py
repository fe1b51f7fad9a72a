"""Data: check a ChatML manifest, encode and cache its clips, collate samples, cut them into micro-batches."""

import collections
import contextlib
import ctypes
import hashlib
import io
import math
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import pydantic
import soundfile
import torch
import torch.distributed as dist
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.data_types import ChatMLSample, TextContent
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

MANIFEST = pydantic.TypeAdapter(list[ChatMLSample], config=pydantic.ConfigDict(extra="forbid", strict=True))
NOT_TEXT = re.compile(r"<\|(?!scene_desc_|generation_instruction_)[^|<>]*\|>")  # a special token
# In libsndfile's log: the size that a file's header tells, and another one, which is true
SIZES = re.compile(r"(?i)^ *(?:rif[fx]|riff size|form|data|data size) *: +(\d+) \(should be (\d+)\)", re.M)
RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this node
NUM_WORKERS = min(16, max(1, len(os.sched_getaffinity(0)) // RANKS // 2))
LOWEST_COST = 2_000  # to launch a micro-batch's kernels takes an H100's time for as many positions


class UserError(Exception):
    """The user's input is at fault: the message says where, what was seen and what to do."""


@contextlib.contextmanager
def user_error(message: str, kind: type[Exception] = Exception):
    """Turn what a library raises on a user's file into a UserError. Stands around single calls only."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from error


def raise_if_any(source, problems: list[str]) -> None:
    """Raise one UserError that lists `problems`, if there are any."""
    if problems:
        told = "\n  ".join(problems[:20])
        raise UserError(f"{source}: {len(problems)} problem(s), at most 20 are shown:\n  {told}")


def complete_in_place(entry: ChatMLSample, folder: Path) -> list[str]:
    """Make contents lists of parts, and clips' paths absolute. Returns what upstream would misread."""
    start, problems = entry.start_index or 0, []
    if start < 0 or not any(message.role == "assistant" for message in entry.messages[start:]):
        problems.append(f"has no assistant turn at or after start_index {start}")
    for i, message in enumerate(entry.messages):
        place, is_trained = f"messages.{i}", message.role == "assistant" and i >= start
        if message.role not in ("system", "user", "assistant") or (message.recipient and not is_trained):
            problems.append(f"{place}: expected system, user or assistant, no recipient: {message!r:.200}")
        parts = message.content if isinstance(message.content, list) else [message.content]
        message.content = [TextContent(part) if isinstance(part, str) else part for part in parts]
        for part in message.content:
            if isinstance(part, TextContent):
                if part.type != "text" or NOT_TEXT.search(part.text):
                    problems.append(f"{place}: expected type text, no special token; seen: {part!r:.200}")
                continue
            part.audio_url = os.path.join(folder, part.audio_url)
            if part.type != "audio" or not os.path.isfile(part.audio_url):
                problems.append(f"{place}: expected type audio, a file that is there; seen: {part!r:.200}")
            elif part.raw_audio or part.offset is not None or part.duration is not None:
                problems.append(f"{place}: inference reads whole files, cut it before; seen: {part!r:.200}")
        said = [part for part in message.content if not isinstance(part, TextContent) or part.text.strip()]
        if is_trained and not said:
            problems.append(f"{place}: a trained turn needs a clip or words; seen: {message!r:.100}")
    return problems


def load_manifest(path: Path) -> list[ChatMLSample]:
    """Entries of a JSON array or JSONL, by upstream's schema, paths absolute. UserError lists bad ones."""
    with user_error(f"--train_manifest {path} cannot be read; expected JSON, in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):  # JSONL. No line ends inside one of JSON's strings
        text = "[" + re.sub(r"\}(\s*\n\s*)\{", r"},\1{", text) + "]"
    try:
        entries = MANIFEST.validate_json(text)
    except pydantic.ValidationError as error:
        # Each type that a part can have tells its errors: show the deepest, and those of the likeliest type
        of_type = collections.Counter(one["loc"][:-1] for one in error.errors())
        first = {}  # of each entry
        for one in sorted(error.errors(), key=lambda one: (-len(one["loc"]), of_type[one["loc"][:-1]])):
            place = ".".join(map(str, one["loc"]))
            first.setdefault(one["loc"][:1], f"entry {place}: {one['msg']}; seen: {one['input']!r:.100}")
        raise_if_any(f"{path}, no ChatML in JSON (of a table: make_manifests)", list(first.values()))
    problems = [] if entries else ["holds no entry; expected one or more"]
    folder = path.absolute().parent
    for i, entry in enumerate(entries):
        problems += [f"entry {i}: {problem}" for problem in complete_in_place(entry, folder)]
    raise_if_any(path, problems)
    return entries


def clips_of(entry: ChatMLSample) -> list[str]:
    """Paths of an entry's clips, in order."""
    return [part.audio_url for message in entry.messages for part in message.content if part.type == "audio"]


def load_waveform(path: str, sample_rate: int) -> np.ndarray:
    """A clip as inference loads it: mono, float32 (samples,). Raises UserError for one that was cut off."""
    with user_error(f"{path}: cannot be decoded as sound; fetch it again, or write it again as wav"):
        data = io.BytesIO(Path(path).read_bytes())
        sound = soundfile.SoundFile(data)
        frames, log, is_mp3 = sound.frames, sound.extra_info, sound.format == "MP3"
        if frames == 2**63 - 1:
            raise UserError(f"{path}: its header tells no length, as from a pipe; write it again as wav")
        wave, rate = librosa.load(sound, sr=None)
        resampled = librosa.resample(wave, orig_sr=rate, target_sr=sample_rate)
    # libsndfile decodes what is there, and reports no error: compare with the header and the file's end
    is_cut = any(int(there) + 64 < int(told) < 1 << 30 for told, there in SIZES.findall(log))
    is_cut |= len(wave) < 0.9 * frames or (is_mp3 and data.tell() < 0.9 * data.getbuffer().nbytes)
    if is_cut or len(wave) < 0.1 * rate:  # the codec's convolutions fail below 0.1 s
        raise UserError(
            f"{path}: {len(wave) / rate:.3f} s decoded, not all or under 0.1; write it again as wav"
        )
    return resampled


def code_files(entries: list[ChatMLSample], cache: Path, codec_id: str) -> dict[str, Path]:
    """{path of a clip: file of its codes}. A clip that changes, or another codec, gets another file."""
    files = {}
    for entry in entries:
        for path in [path for path in clips_of(entry) if path not in files]:
            status = os.stat(path)
            identity = [codec_id, os.path.realpath(path), status.st_size, status.st_mtime_ns]
            files[path] = cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.npy"
    return files


def start_worker(_) -> None:
    """In a DataLoader's worker: end with the main process, even by kill -9; that alone decides on signals."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def in_workers(function, items, num_workers: int) -> DataLoader:
    """function(item) of each item, computed ahead; it returns NumPy arrays, as a tensor keeps a file open."""
    timeout = 600 if num_workers else 0  # seconds for an item
    options = {"num_workers": num_workers, "worker_init_fn": start_worker, "timeout": timeout}
    return DataLoader(items, batch_size=None, collate_fn=function, **options)  # it collates single items


def gather(value) -> list:
    """`value` of each rank, on all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def encode_missing(files: dict[str, Path], load_codec, num_workers: int) -> None:
    """Write the codes that the cache lacks, each clip's on one rank. UserError tells all bad clips."""

    def load(clip):
        try:
            return load_waveform(clip[0], codec.sampling_rate)
        except UserError as error:
            return str(error)

    mine = list(files.items())[dist.get_rank() :: dist.get_world_size()]
    missing = [(path, file) for path, file in mine if not file.exists()]
    codec = load_codec() if missing else None
    with user_error("librosa cannot be imported; where HOME is read-only, set NUMBA_CACHE_DIR"):
        _ = librosa.load, librosa.resample  # it imports them late, and no clip is to blame
    problems, waves = [], in_workers(load, missing, num_workers if missing else 0)
    bar = tqdm(waves, "encoding clips", disable=dist.get_rank() > 0 or not missing)
    for (path, file), wave in zip(missing, bar, strict=True):
        if isinstance(wave, str):
            problems.append(wave)
            continue
        unfinished = file.with_suffix(f".{os.urandom(8).hex()}.npy")
        with user_error(
            f"{path}: not encoded (no memory? cut it), or --code_cache {file.parent} not written"
        ):
            # One clip at a time: padding a batch of clips changes their codes
            codes = codec.encode(wave, codec.sampling_rate).squeeze(0)  # (num_codebooks, T)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(unfinished, codes.cpu().numpy().astype(np.int16))
            unfinished.rename(file)
    raise_if_any("clips", sum(gather(problems), []))


def build_collator(entries: list[ChatMLSample], config) -> HiggsAudioSampleCollator:
    """serve_engine.py's collator, which also hears users' clips. Raises UserError where the base does not."""
    prompts = [turn for entry in entries for turn in entry.messages if turn.role != "assistant"]
    if clips_of(ChatMLSample(prompts)) and not config.encode_audio_in_tokens:
        raise UserError("this base hears no reference in a user's turn: give it in an assistant's")
    return HiggsAudioSampleCollator(
        whisper_processor=None,
        encode_whisper_embed=config.encode_whisper_embed,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        pad_token_id=config.pad_token_id,
        return_audio_in_tokens=config.encode_audio_in_tokens,
        use_delay_pattern=config.use_delay_pattern,
        round_to=1,
        audio_num_codebooks=config.audio_num_codebooks,
    )


@dataclass
class StepDataset:
    """data[plan] is a micro-batch (batch, counts) for each list of entries in `plan`.

    batch: HiggsAudioModel.forward's arguments, as NumPy arrays; A are positions of all clips, end to end.
    counts (1 + num_codebooks + 2,): labels of text and of each codebook, positions without and with padding.
    """

    entries: list[ChatMLSample]
    code_files: dict[str, Path]
    tokenizer: PreTrainedTokenizerBase
    collator: HiggsAudioSampleCollator

    def __getitem__(self, plan: list[list[int]]) -> list[tuple[dict, np.ndarray]]:
        micro_batches = []
        for indices in plan:
            lengths, samples = zip(*map(self.load_sample, indices), strict=True)
            batch = vars(self.collator(list(samples)))
            counts = np.zeros(1 + self.collator.audio_num_codebooks + 2, np.int64)
            counts[-2:] = sum(lengths), len(lengths) * max(lengths)
            for k, labels in enumerate([batch["label_ids"], *batch["label_audio_ids"]]):  # (B, T), (A,) each
                counts[k] = (labels[..., 1:] != -100).sum()
            arrays = {name: x.numpy() for name, x in batch.items() if torch.is_tensor(x)}
            micro_batches.append((batch | arrays, counts))
        return micro_batches

    def load_sample(self, index: int) -> tuple[int, ChatMLDatasetSample]:
        """(positions, sample) of an entry. Made anew each time: the collator overwrites its labels."""
        with user_error(f"entry {index}: upstream refuses it, as printed above"):
            input_ids, label_ids, _, _ = prepare_chatml_sample(self.entries[index], self.tokenizer)
            input_ids, label_ids = torch.LongTensor(input_ids), torch.LongTensor(label_ids)  # (tokens,)
        num_codebooks = self.collator.audio_num_codebooks
        codes = [np.zeros((num_codebooks, 0), np.int16)]  # to join it with other codebooks raises
        for path in clips_of(self.entries[index]):
            file = self.code_files[path]
            with user_error(f"codes {file}: damaged, or another base's: remove them; or not on this node"):
                codes.append(np.concatenate([codes[0], np.load(file)], axis=1))  # (num_codebooks, T)
        all_codes = torch.from_numpy(np.concatenate(codes, axis=1)).long()  # (num_codebooks, sum of all T)
        starts = torch.tensor([clip.shape[1] for clip in codes]).cumsum(0)[:-1]  # (clips,)
        none = torch.zeros(0, dtype=torch.long)  # waveforms, their starts and sample rates; and no speakers
        sample = ChatMLDatasetSample(input_ids, label_ids, all_codes, starts, none, none, none, None)
        # A clip's placeholder becomes BOS, T codes, EOS and num_codebooks - 1 positions of delay
        positions = len(input_ids) + all_codes.shape[1] + len(starts) * num_codebooks
        return math.ceil(positions / 8) * 8, sample  # upstream pads to a multiple of 8


def measure_lengths(data: StepDataset, num_workers: int) -> list[int]:
    """Positions of each entry, on all ranks; each rank loads a share of them, which finds what is refused."""
    mine = np.array_split(range(len(data.entries)), dist.get_world_size())[dist.get_rank()]
    lengths = in_workers(lambda i: data.load_sample(i)[0], mine, num_workers)
    return sum(gather(list(lengths)), [])


def to_tensors(batch: dict, device: torch.device) -> dict:
    """A batch's NumPy arrays as tensors on `device`; to a GPU through pinned memory, without a wait."""
    tensors = {name: torch.from_numpy(x) for name, x in batch.items() if isinstance(x, np.ndarray)}
    if device.type == "cuda":
        tensors = {name: x.pin_memory().to(device, non_blocking=True) for name, x in tensors.items()}
    return batch | tensors


def split_evenly(samples: list[int], lengths: list[int], parts: int) -> list[list[int]]:
    """Cut `samples`, the longest first, into `parts` lists of neighbours of about equal positions."""
    total, before, part = sum(lengths[sample] for sample in samples), 0, -1
    cut = [[] for _ in range(parts)]  # none stays empty where there are as many samples as parts, or more
    for sample in samples:
        middle = before + lengths[sample] / 2
        part = min(math.floor(middle * parts / total), part + 1)
        cut[part].append(sample)
        before += lengths[sample]
    return cut


def split_into_micro_batches(samples: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The cheapest even cut into lists of at most max_tokens positions with padding, or of one sample."""

    def padded(part):  # its positions
        return len(part) * lengths[part[0]]

    cuts = [split_evenly(samples, lengths, parts) for parts in range(1, len(samples) + 1)]
    fitting = [cut for cut in cuts if all(len(part) == 1 or padded(part) <= max_tokens for part in cut)]
    return min(fitting, key=lambda cut: sum(max(LOWEST_COST, padded(part)) for part in cut))
