"""Make train.json and held_out.json, here, of the clips in a folder, in the README's second layout.

python -m tests.manual.make_manifests recordings
    reads recordings/metadata.csv, with lines of file|text|speaker, or of file|text where all is one voice;
    writes the two files into the current folder, in place of older ones
"""

import argparse
import collections
import json
import random
import sys
from pathlib import Path

from dataset import UserError, load_waveform, user_error


def read_rows(table):
    """({line number: fields of that line}, how many most lines have). A header is left out."""
    rows = {}
    with user_error(f"{table} cannot be read as UTF-8"):
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows[number] = [field.strip() for field in line.split("|")]
    if not rows:
        raise UserError(f"{table} has no line; expected file|text or file|text|speaker")
    if not Path(rows[min(rows)][0]).suffix:
        print("       left out as a header:", rows.pop(min(rows)))
    return rows, max((2, 3), key=[len(fields) for fields in rows.values()].count)


def check_clip(file, text):
    """Raise UserError for a clip that is not for training: of 1 to 30 s, whole, and with a text."""
    if not text:
        raise UserError("no text")
    if not file.is_file():
        raise UserError("no such file")
    seconds = len(load_waveform(str(file), 24_000)) / 24_000  # decodes all of it, as training does
    if seconds < 1:
        raise UserError("too short, under 1 s")
    if seconds > 30:
        raise UserError("too long, over 30 s")


def find_clips(folder, rows, width):
    """([(line number, file, text, speaker)] of the clips to use, {reason: numbers of the other lines})."""
    clips, unused, files = [], collections.defaultdict(list), set()
    for number, fields in rows.items():
        file, text, speaker = folder / fields[0], *[*fields[1:], "", ""][:2]
        try:
            if len(fields) != width:
                what = "(a | in the text, or a comma for a |)"
                raise UserError(f"not {width} fields, as most lines have {what}")
            check_clip(file, text)
            if file in files:
                raise UserError("a file of an earlier line")
            files.add(file)
            clips.append((number, str(file), text, speaker))
        except UserError as error:
            unused[str(error)].append(number)
    return clips, unused


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
            unused["alone of its speaker"].append(number)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds metadata.csv and the clips")
    parser.add_argument(
        "--one_in", type=int, default=20, help="one text in so many is held out (default: 20)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system turn before each prompt (default: none)")
    args = parser.parse_args()
    try:
        rows, width = read_rows(args.folder / "metadata.csv")
    except UserError as error:
        sys.exit(f"error: {error}")
    clips, unused = find_clips(args.folder, rows, width)
    random.Random(0).shuffle(clips)
    manifests = make_entries(clips, args.one_in, args.system, unused)
    for name, entries in manifests.items():
        print(f"{len(entries):6} clips are the reply of an entry in {name}")
    for reason, numbers in unused.items():
        print(f"{len(numbers):6} not used, {reason}: line {', '.join(map(str, sorted(numbers)[:20]))}")
    texts, speakers = {text for _, _, text, _ in clips}, {speaker for _, _, _, speaker in clips}
    print(f"{len(rows):6} lines in all; {len(texts)} texts, {len(speakers)} speakers; the second layout")
    if not manifests["train.json"]:
        sys.exit("error: nothing to train; train.json and held_out.json are as they were")
    for name, entries in manifests.items():
        Path(name).write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
