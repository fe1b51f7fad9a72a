"""The README's way from a folder of recordings to a first training: its commands, on a table with faults."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import soundfile

from tests.support import launcher
from tests.support.tiny_checkpoint import speech_like
from tests.test_readme import blocks

# file: (seconds, text, speaker). The text that sorts first is the one of twenty that is held out.
RECORDINGS = {
    "a0.wav": (1.0, "أين تقع المكتبة؟", "a"),
    "b0.wav": (1.2, "أين تقع المكتبة؟", "b"),
    "a1.wav": (1.3, "صباح الخير", "a"),
    "b1.wav": (1.0, "صباح الخير", "b"),
    "a2.wav": (1.1, "مساء الخير", "a"),
    "b2.wav": (1.3, "شكرا جزيلا", "b"),
    "a3.wav": (1.2, "", "a"),
    "b3.wav": (1.1, "إلى اللقاء", "b"),
    "a4.wav": (1.4, "كيف حالك اليوم؟", "a"),
    "b4.wav": (31.0, "طويل", "b"),
    "a5.wav": (0.9, "قصير", "a"),
    "c0.wav": (1.0, "وحيد", "c"),
}
HELD_OUT = "أين تقع المكتبة؟"
NOT_THREE = "not 3 fields (a | in the text, or a comma for a |)"
UNUSED = {
    "a3.wav": "no text",
    "a5.wav": "too short, under 1 s",
    "b4.wav": "too long, over 30 s",
    "c0.wav": "alone of its speaker",
}
LINES = {  # of the table, whose faults are not a clip's
    "wavs/none.wav|بلا ملف|a": "no such file",
    "wavs/a1.wav|صباح | الخير|a": NOT_THREE,
    "wavs/a2.wav,مساء الخير,a": NOT_THREE,
    "wavs/text.wav|ليس صوتا|a": "recordings/wavs/text.wav: cannot be decoded as sound",
}


def make_recordings(folder, table, recordings):
    """Write folder/recordings: metadata.csv with these bytes, and clips {name: (seconds, sample rate)}."""
    for seed, (name, (seconds, rate)) in enumerate(recordings.items()):
        (folder / "recordings" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "recordings" / name, speech_like(seconds, seed), rate)
    (folder / "recordings/metadata.csv").write_bytes(table)


def run_recipe(folder):
    """The lines that the README's command prints there."""
    [command] = blocks("bash", "recordings")
    assert command.startswith("python -m tests.manual.make_manifests ")
    done = launcher.run("tests/manual/make_manifests.py", *command.split()[3:], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """(folder after the recipe: recordings and both manifests, what it printed, the table's lines)."""
    folder = tmp_path_factory.mktemp("newcomer")
    rows = [f" wavs/{name} | {text}|{speaker} " for name, (_, text, speaker) in RECORDINGS.items()]
    table = ["file|text|speaker", *rows[:4], "  \t ", *rows[4:], *LINES, ""]
    clips = {f"wavs/{name}": (seconds, 24_000) for name, (seconds, _, _) in RECORDINGS.items()}
    make_recordings(folder, "\n".join(table).encode(), clips)
    (folder / "recordings/wavs/text.wav").write_text("this is a text")
    return folder, run_recipe(folder), table


def take_apart(entry):
    """(reference's file, its text, target's file, target's text) of an entry in the second layout."""
    asked, heard, text, reply = entry["messages"]
    assert [turn["role"] for turn in entry["messages"]] == ["user", "assistant"] * 2
    assert entry["start_index"] == 3
    reference, target = (Path(turn["content"]["audio_url"]).name for turn in (heard, reply))
    return reference, asked["content"], target, text["content"]


def test_each_usable_clip_is_a_reply_once(newcomer):
    """References are other clips of its speaker, with its text; no held-out clip is trained."""
    folder, _, _ = newcomer
    train, held_out = (json.loads((folder / name).read_text()) for name in ("train.json", "held_out.json"))
    targets = []
    for entry in train + held_out:
        reference, said, target, text = take_apart(entry)
        assert reference != target and RECORDINGS[target][1] == text
        assert RECORDINGS[reference][2] == RECORDINGS[target][2]
        assert said == RECORDINGS[reference][1] != text and reference not in UNUSED
        targets.append(target)
    assert sorted(targets) == sorted(RECORDINGS.keys() - UNUSED.keys())
    assert [take_apart(entry)[3] for entry in held_out] == [HELD_OUT, HELD_OUT]
    assert not any(word in (folder / "train.json").read_text() for word in (HELD_OUT, "a0.wav", "b0.wav"))


def test_each_line_of_the_table_is_accounted_for(newcomer):
    """By its reason and its number; blanks around fields, a header and blank lines are no fault."""
    _, told, table = newcomer
    faults = LINES | {
        line: UNUSED[name] for line in table for name in UNUSED if line.startswith(f" wavs/{name}")
    }
    numbers = {}
    for line, reason in faults.items():
        numbers.setdefault(reason, []).append(table.index(line) + 1)
    expected = [
        "       left out as a header: ['file', 'text', 'speaker']",
        "       clips by speaker: a 4, b 4, c 1",
        "     8 entries: 6 in train.json, 2 in held_out.json",
        "    16 lines in all",
        "       few to compare checkpoints on: --one_in 4 holds out about 2",
    ]
    for reason, where in numbers.items():
        line = f"{len(where):6} not used, {reason}: line {', '.join(map(str, sorted(where)))}"
        file = table[min(where) - 1].split("|")[0].strip()
        expected.append(line if "cannot be decoded" in reason else f"{line}; the first is recordings/{file}")
    undecodable, *others = sorted(told, key=lambda line: "cannot be decoded" not in line)
    told_of_it = [line for line in expected if "cannot be decoded" in line][0]
    start, end = told_of_it.split(": line ")
    assert undecodable.startswith(start) and undecodable.endswith(f": line {end}")
    assert sorted(others) == sorted(set(expected) - {told_of_it})
    counts = [int(line[:6]) for line in told if line[:6].strip()]
    assert sum(counts[:-1]) == counts[-1]


def test_one_voice_without_a_column_of_speakers(tmp_path):
    """file|text, with a blank line, quotes and the line ends of Windows; other formats than wav; one text
    with a | in it, which would be a speaker's name.
    """
    table = 'one.flac|say "one\r\n\r\ntwo.wav|two"\r\nthree.wav|three\r\nfour.wav|so | four'
    clips = dict.fromkeys(("one.flac", "two.wav", "three.wav", "four.wav"), (1.0, 16_000))
    make_recordings(tmp_path, b"\xef\xbb\xbf" + table.encode(), clips)
    told = run_recipe(tmp_path)
    train, held_out = (json.loads((tmp_path / name).read_text()) for name in ("train.json", "held_out.json"))
    assert {take_apart(entry)[3] for entry in train} == {'two"', "three"}
    assert [take_apart(entry)[3] for entry in held_out] == ['say "one']
    assert f"     1 not used, {NOT_THREE.replace('3', '2')}: line 5; the first is recordings/four.wav" in told
    assert "       clips by speaker: (one voice) 3" in told


def test_a_system_turn_and_a_file_named_twice(tmp_path):
    clips = dict.fromkeys(("one.wav", "two.wav", "three.wav"), (1.0, 24_000))
    make_recordings(tmp_path, b"one.wav|one\ntwo.wav|two\nthree.wav|three\ntwo.wav|two", clips)
    done = launcher.run("tests/manual/make_manifests.py", "recordings", "--system", "Speak.", cwd=tmp_path)
    assert "     1 not used, a file of an earlier line: line 4; the first is recordings/two.wav" in (
        done.stdout.splitlines()
    )
    for entry in json.loads((tmp_path / "train.json").read_text()):
        assert entry["messages"][0] == {"role": "system", "content": "Speak."} and entry["start_index"] == 4


def test_from_the_recipe_to_a_comparison(tiny, newcomer):
    """The preflight on both manifests, a training of four steps, the comparison on what it has not seen."""
    folder, _, _ = newcomer
    model = ["--base_ckpt", f"{tiny}/model", "--audio_tokenizer", f"{tiny}/codec"]
    check, train = "validate_pipeline.py", "trainer.py"
    few_steps = ["--grad_accum=1", "--lr=3e-3", "--max_steps=4", "--save_steps=2", "--logging_steps=1"]
    commands = [
        [check, "--train_manifest", "train.json", *model],
        [check, "--train_manifest", "held_out.json", *model],
        [train, "--train_manifest", "train.json", "--output_dir", "out", *model, *few_steps],
        [check, "--train_manifest", "held_out.json", *model, "--adapter", "out/checkpoint-2", "out"],
    ]
    runs = [launcher.run(*command, cwd=folder) for command in commands]
    assert not any(done.returncode for done in runs), [done.stderr for done in runs]
    first, second, _, compared = (done.stdout for done in runs)
    for told, count in ((first, 6), (second, 2)):
        assert f"entries     {count} ({count} with start_index)" in told
        assert f"replies     {count} of clip first" in told
        assert told.endswith("ready for trainer.py with the same options\n")
    losses = [json.loads(line)["loss"] for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "losses of 2 entries" in compared and "\nsmallest    loss: out;" in compared
    rows = {words[0]: words[1:] for words in map(str.split, compared.splitlines()) if len(words) == 12}
    audio = {name: float(losses[1]) for name, losses in rows.items()}
    assert audio["out"] < audio["checkpoint-2"] < audio["base"]  # four steps teach this much already
    assert (folder / "listen/index.html").exists() and (folder / "listen/0-target.wav").exists()


def test_without_a_table_or_with_an_empty_one(tmp_path):
    (tmp_path / "recordings").mkdir()
    command = "tests/manual/make_manifests.py", "recordings"
    done = launcher.run(*command, cwd=tmp_path)
    assert done.returncode == 1 and "error: recordings/metadata.csv cannot be read (File" in done.stderr
    (tmp_path / "recordings/metadata.csv").write_text(" \n")
    done = launcher.run(*command, cwd=tmp_path)
    assert done.returncode == 1 and "metadata.csv has no line; expected file|text" in done.stderr


def make_of(folder, table, names=("c1.wav", "c2.wav", "c3.wav", "c4.wav"), options=()):
    """Run the program on this table and these clips: what it did, and {file: text} of its entries."""
    table = table if isinstance(table, bytes) else table.encode()
    make_recordings(folder, table, dict.fromkeys(names, (1.0, 24_000)))
    done = launcher.run("tests/manual/make_manifests.py", "recordings", *options, cwd=folder)
    texts = {}
    for name in ("train.json", "held_out.json"):
        for entry in json.loads((folder / name).read_text()) if done.returncode == 0 else ():
            reference, said, target, text = take_apart(entry)
            texts |= {reference: said, target: text}
    assert "Traceback" not in done.stderr and done.returncode in (0, 1)
    return done, texts


def test_a_table_in_quotes_as_csv_writes_it(tmp_path):
    table = 'c1.wav|"قال ""نعم"" ثم ذهب"|سعاد\nc2.wav|أين تقع المكتبة؟|سعاد\nc3.wav|"a | b" | سعاد \n'
    _, texts = make_of(tmp_path, table + '"c4.wav" | "say ""x""" | "سعاد"')
    expected = ['قال "نعم" ثم ذهب', "أين تقع المكتبة؟", "a | b", 'say "x"']
    assert texts == dict(zip(("c1.wav", "c2.wav", "c3.wav", "c4.wav"), expected, strict=True))


def test_quotes_that_are_the_texts_own(tmp_path):
    """In its middle, around its first words, around its first and last; a single one swallows no line."""
    texts = ['قال "نعم" ثم ذهب', '"Yes," he said.', '"Yes," he said, "no."', '"نعم']
    table = "".join(f"c{i}.wav|{text}|سعاد\n" for i, text in enumerate(texts, 1))
    done, found = make_of(tmp_path, table)
    assert found == {f"c{i}.wav": text for i, text in enumerate(texts[:3], 1)}
    line = '     1 not used, a field begins with a " that is not closed; close or remove it: line 4'
    assert line in done.stdout and "     4 lines in all" in done.stdout
    done, found = make_of(tmp_path, '"c1.wav|one|s\nc2.wav|two|s\nc3.wav|three|s\nc4.wav|four|s')
    assert sorted(found) == ["c2.wav", "c3.wav", "c4.wav"] and f"{line[:-1]}1" in done.stdout


def test_lines_without_a_speaker_are_not_used(tmp_path):
    table = "c1.wav|one|\nc2.wav|two|سعاد\nc3.wav|three|\nc4.wav|four|سعاد\nc5.wav|five|سعاد"
    done, texts = make_of(tmp_path, table, [f"c{i}.wav" for i in range(1, 6)])
    assert sorted(texts) == ["c2.wav", "c4.wav", "c5.wav"]
    assert "     2 not used, no speaker: line 1, 3; the first is recordings/c1.wav\n" in done.stdout


def test_names_that_differ_by_case_or_blanks_are_told(tmp_path):
    table = "c1.wav|one|Sara\nc2.wav|two|sara\nc3.wav|three|Sara \nc4.wav|four|Sara\nc5.wav|five|s ara"
    done, texts = make_of(tmp_path, table, [f"c{i}.wav" for i in range(1, 6)])
    assert "       clips by speaker: Sara 3, sara 1, s ara 1\n" in done.stdout
    told = (
        "       warning: ['Sara', 'sara', 's ara'] differ by case or blanks only; give one speaker one name\n"
    )
    assert told in done.stdout or told.replace("'sara', 's ara'", "'s ara', 'sara'") in done.stdout
    assert sorted(texts) == ["c1.wav", "c3.wav", "c4.wav"]


@pytest.mark.parametrize(
    "table, texts",
    [
        ("c1.wav|س|one\nc2.wav|س|two\nc3.wav|ع|three\nc4.wav|ع|four\n", 2),
        (
            "c1.wav|Mr. 1|Mister one\nc2.wav|2|two\nc3.wav|3|three\nc4.wav|4|four\n",
            4,
        ),  # LJSpeech's third column
    ],
)
def test_a_column_of_speakers_that_is_none_is_told(tmp_path, table, texts):
    done, _ = make_of(tmp_path, table)
    assert f"warning: 4 of 4 speakers have one clip; there are {texts} texts." in done.stdout
    assert "Are columns swapped, or is the third a text, too? Expected file|text|speaker\n" in done.stdout
    assert done.returncode == 1 and "error: nothing to train" in done.stderr


@pytest.mark.parametrize("delimiter, name", [(";", "semicolons"), (",", "commas"), ("\t", "tabs")])
def test_another_delimiter_is_named_and_the_command_mends_it(tmp_path, delimiter, name):
    texts = ['قال "نعم" ثم ذهب', "صباح الخير", f'"so{delimiter} ""four"""', "four | five"]
    lines = [delimiter.join((f"c{i}.wav", text, "سعاد")) for i, text in enumerate(texts, 1)]
    (tmp_path / "train.json").write_text("[]")
    done, _ = make_of(tmp_path, "\n".join(lines))
    told, command = done.stderr.splitlines()
    assert told == f"error: recordings/metadata.csv has {name} between its columns; this writes | there:"
    assert done.returncode == 1 and (tmp_path / "train.json").read_text() == "[]"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    _, found = make_of(tmp_path, (tmp_path / "recordings/metadata.csv").read_bytes())
    assert list(dict(sorted(found.items())).values()) == [*texts[:2], f'so{delimiter} "four"', texts[3]]


def test_a_table_without_columns(tmp_path):
    done, _ = make_of(tmp_path, "c1.wav\nc2.wav")
    assert (
        done.stderr
        == "error: recordings/metadata.csv has no columns; expected file|text or file|text|speaker\n"
    )


def test_ids_without_endings_are_told_with_the_path(tmp_path):
    """The first line is none of columns: its clip is there."""
    done, _ = make_of(tmp_path, "c1|first|سعاد\nc2|second|سعاد\nc3|third|عمر\nc4|fourth|عمر\n")
    told = "     4 not used, no such file, but one with an ending: write that, too: line 1, 2, 3, 4; "
    assert f"{told}the first is recordings/c1\n" in done.stdout and "header" not in done.stdout


@pytest.mark.parametrize(
    "encoding, named",
    [("cp1256", "CP1256"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16")],
)
def test_another_encoding_gets_a_command_that_mends_it(tmp_path, encoding, named):
    table = "c1.wav|صباح الخير|سعاد\r\nc2.wav|أين|سعاد\r\nc3.wav|three|سعاد\r\n"
    done, _ = make_of(tmp_path, table.encode(encoding))
    told, command = done.stderr.splitlines()
    assert told.startswith(f"error: recordings/metadata.csv is not UTF-8; if it is {named}, this ")
    assert command.startswith(f"iconv -f {named} -t UTF-8 ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    _, found = make_of(tmp_path, (tmp_path / "recordings/metadata.csv").read_bytes())
    assert found == {"c1.wav": "صباح الخير", "c2.wav": "أين", "c3.wav": "three"}


def test_a_long_list_of_lines_says_how_many_more(tmp_path):
    done, _ = make_of(tmp_path, "".join(f"none{i}.wav|text\n" for i in range(25)))
    numbers = ", ".join(map(str, range(1, 21)))
    assert (
        f"not used, no such file: line {numbers} and 5 more; the first is recordings/none0.wav" in done.stdout
    )


def test_tables_of_other_programs(tmp_path):
    """Excel's mark of UTF-8, first line and line ends, other names of columns, bars at the ends of lines."""
    table = "\ufeffsep=|\r\npath|transcript|speaker|\r\nc1.wav|one|س|\r\nc2.wav|two|س|\r\nc3.wav|three|س|\r\n"
    done, texts = make_of(tmp_path, table)
    assert "left out as a header: ['path', 'transcript', 'speaker']\n" in done.stdout
    assert texts == {"c1.wav": "one", "c2.wav": "two", "c3.wav": "three"}
    done, texts = make_of(tmp_path, "c1.wav|one|\rc2.wav|two|\rc3.wav|three|\r")  # an old Mac's; one voice
    assert "clips by speaker: (one voice) 3\n" in done.stdout and len(texts) == 3


def test_names_of_files_as_other_systems_write_them(tmp_path):
    """Windows' backslashes; a path from the root; a letter and its accent, which macOS writes apart."""
    apart, joined = (unicodedata.normalize(form, "é.wav") for form in ("NFD", "NFC"))
    other = tmp_path / "recordings/a/c3.wav"
    table = f"a\\c1.wav|one\na\\c2.wav|two\n{other}|three\nC:\\a\\c1.wav|four\n{joined}|five\n"
    done, texts = make_of(tmp_path, table, ("a/c1.wav", "a/c2.wav", "a/c3.wav", apart))
    assert texts == {"c1.wav": "one", "c2.wav": "two", "c3.wav": "three", apart: "five"}
    assert "     1 not used, no such file: line 4; the first is recordings/C:\\a\\c1.wav\n" in done.stdout


@pytest.mark.parametrize("options, train, held_out", [((), 38, 2), (("--one_in", "4"), 30, 10)])
def test_forty_clips(tmp_path, options, train, held_out):
    names = [f"{i}.wav" for i in range(40)]
    done, _ = make_of(tmp_path, "".join(f"{name}|{name[:-4]}\n" for name in names), names, options)
    assert f"    40 entries: {train} in train.json, {held_out} in held_out.json\n" in done.stdout
    for name, count in (("train.json", train), ("held_out.json", held_out)):
        assert len(json.loads((tmp_path / name).read_text())) == count
    told = "few to compare checkpoints on: --one_in 4 holds out about 10\n"
    assert (told in done.stdout) == (not options)


def test_one_in_one_would_train_nothing(tmp_path):
    done = launcher.run("tests/manual/make_manifests.py", "recordings", "--one_in", "1", cwd=tmp_path)
    assert done.returncode == 2 and "--one_in must be at least 2" in done.stderr


def test_a_cache_that_cannot_be_written_is_no_clips_fault(tmp_path):
    """numba is left the one place that NUMBA_CACHE_DIR names, and it names none."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.manual.make_manifests", str(tmp_path)],
        cwd=launcher.ROOT,
        env=environment | {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "error: librosa cannot be imported; where HOME is read-only, set NUMBA_CACHE" in done.stderr
