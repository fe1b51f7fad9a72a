"""Make train.json and held_out.json, here, of the clips in a folder, in the README's second layout.

python -m tests.manual.make_manifests recordings
    reads recordings/metadata.csv, with lines of file|text|speaker, or of file|text where all is one voice;
    writes the two files into the current folder, in place of older ones
"""

import argparse
import collections
import csv
import glob
import io
import json
import os
import random
import re
import shlex
import sys
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import soundfile

from dataset import SIZES, UserError, user_error

# What other tables have between their columns
DELIMITERS = {"\t": "tabs", ";": "semicolons", ",": "commas"}
# The first bytes of a file, and of an mp3's frame: seen again later, the file is several files joined
STARTS = {"OGG": b"OggS\0\2", "FLAC": b'fLaC\0\0\0"', "RF64": b"WAVEds64"}
STARTS |= dict.fromkeys(("WAV", "WAVEX"), b"WAVEfmt ")
FRAME = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")
# The frame of an mp3 that tells its length, which is a guess without it
XING = re.compile(FRAME.pattern + rb".{11,34}(?:Xing|Info)", re.S)


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


def load_whole(path: str, sample_rate: int) -> np.ndarray:
    """A clip as inference loads it, mono, float32 (samples,); UserError for one that is not whole: checks
    more than dataset.load_waveform, as recordings come in here.
    """
    with user_error(f"{path}: cannot be decoded as sound; fetch it again, or write it again as wav"):
        sound, data = soundfile.SoundFile(path), Watched(Path(path).read_bytes())
        if sound.frames == 2**63 - 1:  # libsndfile's way to say that it is unknown
            why = "its header does not tell its length, as when it was written into a pipe"
            raise UserError(f"{path}: {why}; write it again, as wav: ffmpeg -i {shlex.quote(path)} NEW.wav")
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


def read_lines(table):
    """{line number: line} of a table, without blank lines; UserError for another encoding or delimiter."""
    with user_error(f"{table} cannot be read"):
        content = table.read_bytes()
    name, encoding = shlex.quote(str(table)), "UTF-8"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = "CP1256"  # Windows' own for Arabic
    if b"\0" in content:  # half of each ASCII character
        encoding = "UTF-16"
    if encoding != "UTF-8":
        remedy = f"iconv -f {encoding} -t UTF-8 {name} > utf8.csv && mv utf8.csv {name}"
        raise UserError(f"{table} is not UTF-8; if it is {encoding}, this converts it:\n{remedy}")
    numbered = enumerate(re.split("\r\n?|\n", text), 1)
    # Excel's tables may begin with a line like sep=|
    lines = {number: line for number, line in numbered if line.strip() and not line.startswith("sep=")}
    if not lines:
        raise UserError(f"{table} has no line; expected file|text or file|text|speaker")
    check_delimiter(table, lines)
    return lines


def check_delimiter(table, lines):
    """Raise UserError, with a command that mends it, where most lines have no bar."""
    seen = [mark for mark in DELIMITERS if mark in lines[min(lines)]]
    if sum("|" in line for line in lines.values()) >= len(lines) / 2:
        return
    if not seen:
        raise UserError(f"{table} has no columns; expected file|text or file|text|speaker")
    name, source = shlex.quote(str(table)), f"csv.reader(sys.stdin, delimiter={seen[0]!r})"
    code = f"import csv, sys; csv.writer(sys.stdout, delimiter='|').writerows({source})"
    remedy = f'python -c "{code}" < {name} > bars.csv && mv bars.csv {name}'
    raise UserError(f"{table} has {DELIMITERS[seen[0]]} between its columns; this writes | there:\n{remedy}")


def split_fields(line):
    """A line's fields as csv means them: in a field in quotes "" is a quote, and | is no delimiter."""
    try:
        without_blanks = re.sub(r'"\s+\|', '"|', line.strip())
        fields = next(csv.reader([without_blanks], delimiter="|", skipinitialspace=True, strict=True))
    except csv.Error:  # a text can begin with a quoted word, too, and keeps its quotes
        fields = line.split("|")
        if any(field.strip().startswith('"') and field.count('"') % 2 for field in fields):
            raise UserError('a field begins with a " that is not closed; close or remove it') from None
    fields = [field.strip() for field in fields]
    return fields[:3] if not any(fields[3:]) else fields  # bars at its end


def find_file(folder, name):
    """A clip's path. Its name may have Windows' backslashes, or accents in another of Unicode's forms."""
    slashes = name.replace("\\", "/")
    forms = [unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")]
    found = [folder / form for form in (name, slashes, *forms) if os.path.isfile(folder / form)]
    return found[0] if found else folder / name


def is_without_ending(file):
    """Whether there is such a file if an ending like .wav is added to its name."""
    return bool(glob.glob(glob.escape(str(file)) + ".*"))


def read_rows(table, unused):
    """({line number: fields}, how many most have), without a header. What is no csv goes to `unused`."""
    rows = {}
    for number, line in read_lines(table).items():
        try:
            rows[number] = split_fields(line)
        except UserError as error:
            unused[str(error)].append((number, line))
    first = find_file(table.parent, rows[min(rows)][0]) if rows else table
    if not (first.suffix or os.path.isfile(first) or is_without_ending(first)):
        print("       left out as a header:", rows.pop(min(rows)))
    width = max((3, 2), key=[len(fields) for fields in rows.values()].count)
    if not any(field for fields in rows.values() for field in fields[2:]):  # one voice, and bars at the end
        rows, width = {number: fields[:2] for number, fields in rows.items()}, 2
    return rows, width


def check_clip(file, text):
    """Raise UserError for a clip that is not for training: of 1 to 30 s, whole, and with a text."""
    if not text:
        raise UserError("no text")
    if not os.path.isfile(file):
        told = ", but one with an ending: write that, too" if is_without_ending(file) else ""
        raise UserError(f"no such file{told}")
    seconds = len(load_whole(str(file), 24_000)) / 24_000  # decodes all of it, as training does
    if seconds < 1:
        raise UserError("too short, under 1 s")
    if seconds > 30:
        raise UserError("too long, over 30 s")


def find_clips(folder, rows, width, unused):
    """[(line number, file, text, speaker)] of the clips to use. The other lines go to `unused`."""
    clips, files = [], set()
    for number, fields in rows.items():
        file, text, speaker = find_file(folder, fields[0]), *[*fields[1:], "", ""][:2]
        try:
            if len(fields) != width:
                raise UserError(f"not {width} fields (a | in the text, or a comma for a |)")
            if width == 3 and not speaker:
                raise UserError("no speaker")
            check_clip(file, text)
            if file in files:
                raise UserError("a file of an earlier line")
            files.add(file)
            clips.append((number, str(file), text, speaker))
        except UserError as error:
            unused[str(error)].append((number, str(file)))
    return clips


def make_entries(clips, one_in, system, unused):
    """{manifest's name: entries}: each clip is a reply once; one text in `one_in` is in held_out.json.

    The reference is another clip of the same speaker, which is not held out. `system` is the text of a system
    turn before it all, or None.
    """
    begin = [{"role": "system", "content": system}] if system else []
    texts = sorted({text for _, _, text, _ in clips})
    held_out, manifests = set(texts[::one_in]), {"train.json": [], "held_out.json": []}
    references = collections.defaultdict(list)
    for _, file, text, speaker in clips:
        if text not in held_out:
            references[speaker].append((file, text))
    for number, file, text, speaker in clips:
        others = [(other, said) for other, said in references[speaker] if said != text]
        if not others:
            unused["alone of its speaker"].append((number, file))
            continue
        reference, said = random.Random(file).choice(others)
        messages = [
            *begin,
            {"role": "user", "content": said},
            {"role": "assistant", "content": {"audio_url": reference}},
            {"role": "user", "content": text},
            {"role": "assistant", "content": {"audio_url": file}},
        ]
        name = "held_out.json" if text in held_out else "train.json"
        manifests[name].append({"messages": messages, "start_index": len(messages) - 1})
    return manifests


def tell_speakers(clips):
    """Print each speaker's number of clips, and what in them looks like a mistake of the table."""
    counts = collections.Counter(speaker or "(one voice)" for *_, speaker in clips)
    told = [f"{name} {count}" for name, count in counts.most_common()]
    print("       clips by speaker:", ", ".join(told) or "none")
    spellings = collections.defaultdict(list)
    for name in counts:
        spellings["".join(name.casefold().split())].append(name)
    for names in spellings.values():
        if len(names) > 1:
            print(f"       warning: {names} differ by case or blanks only; give one speaker one name")
    alone, texts = list(counts.values()).count(1), len({text for _, _, text, _ in clips})
    if alone > max(2, len(counts) / 2):
        print(f"       warning: {alone} of {len(counts)} speakers have one clip; there are {texts} texts.")
        print("       Are columns swapped, or is the third a text, too? Expected file|text|speaker")


def tell_unused(unused):
    """Print each reason not to use a line, with the lines' numbers and the file of the first."""
    for reason, lines in unused.items():
        numbers, first = [str(number) for number, _ in sorted(lines)], min(lines)[1]
        more = f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
        file = "" if first in reason else f"; the first is {first}"
        print(f"{len(lines):6} not used, {reason}: line {', '.join(numbers[:20])}{more}{file}")


def tell_unnamed(folder, clips, unused):
    """Print the clips in the folder that no line of the table names; at most 20."""
    in_lines = [file for _, file, *_ in clips] + [file for lines in unused.values() for _, file in lines]
    named = {Path(file).name for file in in_lines}
    sounds = [
        file.name for file in sorted(folder.iterdir()) if file.suffix in (".wav", ".flac", ".ogg", ".mp3")
    ]
    for name in [name for name in sounds if name not in named][:20]:
        print(f"       in the folder, but in no line: {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds metadata.csv and the clips")
    parser.add_argument("--one_in", type=int, default=20, help="one text in so many is held out (20)")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before each prompt (default: none)")
    args = parser.parse_args()
    if args.one_in < 2:
        parser.error("--one_in must be at least 2")
    unused = collections.defaultdict(list)  # reason: [(line number, its file)]
    try:
        with user_error("librosa cannot be imported; where HOME is read-only, set NUMBA_CACHE_DIR"):
            _ = librosa.load, librosa.resample  # imported here: where that fails, no clip is to blame
        rows, width = read_rows(args.folder / "metadata.csv", unused)
    except UserError as error:
        sys.exit(f"error: {error}")
    clips = find_clips(args.folder, rows, width, unused)
    random.Random(0).shuffle(clips)
    manifests = make_entries(clips, args.one_in, args.system, unused)
    tell_speakers(clips)
    tell_unused(unused)
    tell_unnamed(args.folder, clips, unused)
    train, held_out = (len(entries) for entries in manifests.values())
    print(f"{train + held_out:6} entries: {train} in train.json, {held_out} in held_out.json")
    print(f"{train + held_out + sum(map(len, unused.values())):6} lines in all")
    if not train:
        sys.exit("error: nothing to train; train.json and held_out.json are as they were")
    for name, entries in manifests.items():
        Path(name).write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    total = train + held_out
    one_in = max(4, total // 20)  # holds out 20 entries, but a quarter of all at most
    if held_out < 20 and one_in < args.one_in:
        print(
            f"       few to compare checkpoints on: --one_in {one_in} holds out about {round(total / one_in)}"
        )


if __name__ == "__main__":
    main()
