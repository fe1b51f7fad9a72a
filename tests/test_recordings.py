"""The README's way from a folder of recordings to a first training: its recipe as printed, its commands."""

import json
import subprocess
import sys
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
UNUSED = {"a3.wav": "no text", "a5.wav": "too short", "b4.wav": "too long", "c0.wav": "alone"}  # as targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a newcomer stands after the recipe: recordings, both manifests, and what it printed."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "recordings/wavs").mkdir(parents=True)
    for seed, (name, (seconds, _, _)) in enumerate(RECORDINGS.items()):
        soundfile.write(folder / "recordings/wavs" / name, speech_like(seconds, seed), 24_000)
    rows = [f"wavs/{name}|{text}|{speaker}" for name, (_, text, speaker) in RECORDINGS.items()]
    (folder / "recordings/metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    [recipe] = blocks("python", "metadata.csv")
    assert len(recipe.strip().splitlines()) <= 20
    done = subprocess.run([sys.executable, "-c", recipe], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def take_apart(entry):
    """(reference's file, its text or None, target's file, target's text) of either layout."""
    *prompt, reply = entry["messages"]
    assert entry["start_index"] == len(prompt) and reply["role"] == "assistant"
    target = Path(reply["content"][0]["audio_url"]).name
    if len(prompt) == 1:
        [heard, text] = prompt[0]["content"]
        return Path(heard["audio_url"]).name, None, target, text
    asked, heard, text = prompt
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
    return Path(heard["content"][0]["audio_url"]).name, asked["content"], target, text["content"]


def test_the_recipe(folder):
    """Each usable clip is a target once; references are other clips of its speaker, in the layout their text
    asks for; nothing of the held-out clips is in train.json.
    """
    train, held_out = (json.loads((folder / name).read_text()) for name in ("train.json", "held_out.json"))
    told = (folder / "printed").read_text()
    assert told == "2 clips left out by length; {'train.json': 6, 'held_out.json': 2}\n"
    targets, layouts = [], set()
    for entry in train + held_out:
        reference, said, target, text = take_apart(entry)
        assert reference != target and RECORDINGS[target][1] == text
        assert RECORDINGS[reference][2] == RECORDINGS[target][2]
        assert (said or "") == RECORDINGS[reference][1] and said != text
        assert reference not in UNUSED or UNUSED[reference] == "no text"
        targets.append(target)
        layouts.add(len(entry["messages"]))
    assert sorted(targets) == sorted(RECORDINGS.keys() - UNUSED.keys()) and layouts == {2, 4}
    assert [take_apart(entry)[3] for entry in held_out] == [HELD_OUT, HELD_OUT]
    assert not any(word in (folder / "train.json").read_text() for word in (HELD_OUT, "a0.wav", "b0.wav"))


def test_one_voice_without_a_column_of_speakers(tmp_path):
    """file|text, with a blank line, quotes and the line ends of Windows; other formats than wav."""
    (tmp_path / "recordings").mkdir()
    for seed, name in enumerate(("one.flac", "two.wav", "three.wav")):
        soundfile.write(tmp_path / "recordings" / name, speech_like(1.0, seed), 16_000)
    table = 'one.flac|say "one|\r\n\r\ntwo.wav|two"\r\nthree.wav|three'
    (tmp_path / "recordings/metadata.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    [recipe] = blocks("python", "metadata.csv")
    subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, check=True, capture_output=True)
    train, held_out = (json.loads((tmp_path / name).read_text()) for name in ("train.json", "held_out.json"))
    assert {take_apart(entry)[3] for entry in train} == {'two"', "three"}
    assert [take_apart(entry)[3] for entry in held_out] == ['say "one']


def test_from_the_recipe_to_a_comparison(tiny, folder):
    """The preflight on both manifests, a training of four steps, the comparison on what it has not seen."""
    model = ["--base_ckpt", f"{tiny}/model", "--audio_tokenizer", f"{tiny}/codec"]
    check, train = "validate_pipeline.py", "trainer.py"
    commands = [
        [check, "--train_manifest", "train.json", *model],
        [check, "--train_manifest", "held_out.json", *model],
        [
            train,
            "--train_manifest",
            "train.json",
            "--output_dir",
            "out",
            *model,
            "--grad_accum",
            "1",
            "--lr",
            "3e-3",
            "--max_steps",
            "4",
            "--save_steps",
            "2",
            "--logging_steps",
            "1",
        ],
        [check, "--train_manifest", "held_out.json", *model, "--adapter", "out/checkpoint-2", "out"],
    ]
    runs = [launcher.run(*command, cwd=folder) for command in commands]
    assert not any(done.returncode for done in runs), [done.stderr for done in runs]
    first, second, _, compared = (done.stdout for done in runs)
    for told, count in ((first, 6), (second, 2)):
        assert f"entries     {count} " in told and "reference   of entry 0 is heard" in told
        assert told.endswith("ready for trainer.py with the same options\n")
    losses = [json.loads(line)["loss"] for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "losses      of 2 entries" in compared and "\nbest        out" in compared
    rows = [line.split() for line in compared.splitlines() if line.startswith("  ")]
    rows = {row[-1]: float(row[1]) for row in rows}  # of audio
    assert rows["out"] < rows["out/checkpoint-2"] < rows["(base)"]  # four steps teach this much already
