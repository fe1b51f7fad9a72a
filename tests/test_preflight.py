"""validate_pipeline.py on the user's own data: what it tells, what it suspects, what it refuses."""

import json
import re

import numpy as np
import pytest
import soundfile

import validate_pipeline
from tests.support import launcher
from tests.support.tiny_checkpoint import TEXTS, speech_like, voice_cloning_entry


def preflight(tiny, entries, *flags):
    """(exit code, what it printed)."""
    manifest = tiny / "preflight.json"
    manifest.write_text(json.dumps(entries))
    done = launcher.run(
        "validate_pipeline.py",
        "--train_manifest",
        manifest,
        "--base_ckpt",
        tiny / "model",
        "--audio_tokenizer",
        tiny / "codec",
        *flags,
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


@pytest.fixture
def doubtful(tiny):
    """Entries that are valid but for teaching a voice: one kind of doubt each, after two good ones."""
    silent, clipped = speech_like(1.2, seed=21), 4 * speech_like(1.2, seed=22)
    silent[-24_000 * 7 // 10 :] = 0
    for name, wave in (("silent", silent), ("clipped", clipped)):
        soundfile.write(tiny / "clips" / f"{name}.wav", np.clip(wave, -1, 1), 24_000)
    pairs = [
        (TEXTS[0], "voice_a", "target_a"),
        ("good morning my dear", "voice_b", "target_b"),
        ("this one ends early", "voice_a", "silent"),
        ("this one is too loud", "voice_a", "clipped"),
        ("the very same clip ", "voice_b", "voice_b"),
        ("far too long a text " * 9, "voice_a", "target_c"),
        ("", "voice_a", "target_c"),
    ]
    return [
        voice_cloning_entry(text, f"clips/{voice}.wav", f"clips/{target}.wav")
        for text, voice, target in pairs
    ]


def test_what_the_data_holds_and_what_is_doubtful(tiny, doubtful):
    turns = [
        {"role": "user", "content": "1 2 3"},
        {"role": "assistant", "content": {"audio_url": "clips/voice_b.wav"}},
    ]
    masked = {"messages": turns + doubtful[0]["messages"][1:], "start_index": 3}
    code, told = preflight(tiny, [*doubtful, masked], "--batch_size", "2", "--grad_accum", "2")
    lines = told.splitlines()
    assert code == 0, told
    for line in (
        "entries     8 (1 with start_index), 7 distinct clips",
        "references  0:00:01 (h:mm:ss) in 2 distinct clips",
        "targets     0:00:06 (h:mm:ss) in 6 distinct clips",
    ):
        assert line in lines
    assert re.search(r"(?m)^device: cpu \(.* threads\), base in torch.float32, max_tokens automatic$", told)
    assert re.search(r"\npositions   [\d,]+ an epoch, about; the longest entry has \d+", told)
    assert any(line.startswith("1 GPU(s)    like cpu: 2.0 optimizer steps an epoch of 4") for line in lines)
    assert any(line.startswith("8 GPU(s)    like cpu: 0.2 optimizer steps an epoch of 32") for line in lines)
    assert "replies     8 of clip first: any engine speaks them" in lines
    assert f"{TEXTS[0]}<|eot_id|>" in told  # the prompt; the reply is its clip, and its end
    trained = "and trained on '<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>': 3 labels of text, 31"
    assert trained in told and "trainable   204,800 parameters" in told
    assert "reference   heard, in turns of: assistant, user" in lines
    assert (
        "largest     micro-batch: 2 samples, " in told
        and told.count("by the time of the largest micro-batch\n") == 2
    )
    memory = float(re.search(r"([\d.]+) GB peak memory", told)[1])
    assert 0.1 < memory < 4  # on a CPU of the whole process
    doubts = {
        line.split(": ")[0].strip(): line
        for line in lines[
            lines.index(next(filter(lambda line: line.startswith("worth a look"), lines))) + 1 : -1
        ]
    }
    for where, doubt in (
        (f"{tiny}/clips/silent.wav", "ends in 0.6"),
        (f"{tiny}/clips/clipped.wav", "is clipped: "),
        ("entry 4", "clips/voice_b.wav is both reference and target"),
        ("entry 5", "its text has 186.5 characters a second of its clip, "),
        ("entry 6", "its text has 0.0 characters a second of its clip, "),
    ):
        assert doubt in doubts.pop(where)
    assert not doubts and lines[-1] == "ready for trainer.py with the same options"


@pytest.mark.parametrize("text", ["lost \ufffd", "a\x00b", "you &amp; me", "&#39;", "ØµØ¨Ø§Ø\xad", "cafÃ©"])
def test_odd_texts(text):
    """Lost characters, control characters, HTML, UTF-8 that was read as Latin-1."""
    [(where, what)] = validate_pipeline.find_odd_texts([entry_of(text)], {})
    assert where == "entry 0" and "looks like a fault" in what


@pytest.mark.parametrize("text", ["صباح الخير", "Ça va? Où? à côté", "R&D; a & b", "a\nb\tc", "50 % ×"])
def test_texts_that_are_not_odd(text):
    assert not validate_pipeline.find_odd_texts([entry_of(text)], {})


def entry_of(text):
    turns = [("user", text), ("assistant", "yes")]
    return {"messages": [{"role": role, "content": [{"type": "text", "text": part}]} for role, part in turns]}


def test_references_in_other_layouts_and_deaf_ones(tiny, entries):
    code, told = preflight(tiny, entries, "--return_audio_in_tokens", "false")
    assert code == 0 and "reference   NOT heard, in turns of: user" in told.splitlines()
    replies = [
        {"role": "assistant", "content": {"audio_url": f"clips/{name}.wav"}}
        for name in ("voice_a", "target_a")
    ]
    asked = {"role": "user", "content": "hello"}
    turns = [asked, replies[0], asked, replies[1]]
    code, told = preflight(tiny, [{"messages": turns, "start_index": 3}])
    assert code == 0 and "reference   heard, in turns of: assistant\n" in told


def test_a_reference_that_is_trained_is_told():
    """The second layout without its start_index trains the reference's reply as well."""
    turns = []
    for role, part in (("user", "a"), ("assistant", "r.wav"), ("user", "b"), ("assistant", "t.wav")):
        content = {"type": "text", "text": part} if role == "user" else {"type": "audio", "audio_url": part}
        turns.append({"role": role, "content": [content]})
    frames = {"r.wav": 25, "t.wav": 25}
    masked, unmasked = {"messages": turns, "start_index": 3}, {"messages": turns}
    found = validate_pipeline.find_odd_texts([masked, unmasked], frames)
    assert found == [("entry 1", "trains 2 turns: start_index is not set")]


def test_text_alone_is_legal(tiny):
    code, told = preflight(
        tiny,
        [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}],
    )
    assert code == 0 and "reference   there is none" in told and "targets     0:00:00 (h:mm:ss) in 0" in told


def test_what_is_to_be_fixed_ends_the_list(tiny, entries):
    """A broken manifest is told before anything is loaded; its exit code is 1, and there is no traceback."""
    missing = voice_cloning_entry("hello", "clips/voice_a.wav", "clips/none.wav")
    code, told = preflight(tiny, [*entries, missing, {"messages": []}])
    said = told[told.index("error: ") :].splitlines()
    assert code == 1 and "Traceback" not in told and said[0].endswith("preflight.json: 2 problem(s)")
    assert said[1].startswith("  entry 3: messages[2]: content[0]: audio: audio_url: no such file, from the")
    assert "clips/none.wav" in said[1]
    assert said[2] == "  entry 4: has no assistant turn at or after start_index 0"


def test_kinds_of_replies_and_what_they_mean_for_engines(tiny, entries):
    """The user's own layout has text, then the clip: engines that force audio at once are silently wrong."""
    both = json.loads(json.dumps(entries[0]))
    both["messages"][-1]["content"].insert(0, {"type": "text", "text": "so be it"})
    text = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    code, told = preflight(tiny, [entries[0], both, text, text])
    assert code == 0, told
    assert [line for line in told.splitlines() if line.startswith("replies ")] == [
        "replies     1 of clip first: any engine speaks them",
        "replies     1 of text, then clip: give an engine that speaks at once the text first, or it is "
        "silently wrong (README)",
        "replies     2 of text only: train no voice",
    ]
