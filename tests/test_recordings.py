"""The README's way from a folder of recordings to a first training: its commands, on a table with faults."""

import json
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
NOT_THREE = "not 3 fields, as most lines have (a | in the text, or a comma for a |)"
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
        "     6 clips are the reply of an entry in train.json",
        "     2 clips are the reply of an entry in held_out.json",
        "    16 lines in all; 7 texts, 3 speakers; the second layout",
    ]
    for reason, where in numbers.items():
        expected.append(f"{len(where):6} not used, {reason}: line {', '.join(map(str, sorted(where)))}")
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
    assert f"     1 not used, {NOT_THREE.replace('3', '2')}: line 5" in told


def test_commas_for_bars_are_told(tmp_path):
    make_recordings(tmp_path, b"file,text\none.wav,hello\ntwo.wav,good day", {"one.wav": (1.0, 24_000)})
    (tmp_path / "train.json").write_text("[]")
    done = launcher.run("tests/manual/make_manifests.py", "recordings", cwd=tmp_path)
    told = done.stdout.splitlines()
    assert f"     2 not used, {NOT_THREE.replace('3', '2')}: line 2, 3" in told
    assert told[-1] == "     2 lines in all; 0 texts, 0 speakers; the second layout"
    assert (
        done.returncode == 1 and "error: nothing to train; train.json and held_out.json are as" in done.stderr
    )
    assert not (tmp_path / "held_out.json").exists()


def test_a_system_turn_and_a_file_named_twice(tmp_path):
    clips = dict.fromkeys(("one.wav", "two.wav", "three.wav"), (1.0, 24_000))
    make_recordings(tmp_path, b"one.wav|one\ntwo.wav|two\nthree.wav|three\ntwo.wav|two", clips)
    done = launcher.run("tests/manual/make_manifests.py", "recordings", "--system", "Speak.", cwd=tmp_path)
    assert "     1 not used, a file of an earlier line: line 4" in done.stdout.splitlines()
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
        assert "reference   heard, in turns of: assistant\n" in told
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
    assert done.returncode == 1 and "error: recordings/metadata.csv cannot be read as UTF-8" in done.stderr
    (tmp_path / "recordings/metadata.csv").write_text(" \n")
    done = launcher.run(*command, cwd=tmp_path)
    assert done.returncode == 1 and "metadata.csv has no line; expected file|text" in done.stderr
