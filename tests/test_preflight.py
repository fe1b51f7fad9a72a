"""validate_pipeline.py on the user's own data: what it tells, what it suspects, what it refuses."""

import json
import re
import shutil
import unicodedata

import numpy as np
import pytest
import soundfile
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

import trainer
import validate_pipeline
from tests.support import launcher
from tests.support.batches import CPU
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
    assert re.search(r"(?m)^device      cpu, base in torch.float32$", told)
    assert re.search(r"\npositions   [\d,]+ an epoch; the longest entry, 5, has [\d,]+\n", told)
    assert any(line.startswith("1 GPU(s)    4 steps in all, 2.0 an epoch of 4 samples, ") for line in lines)
    assert any(line.startswith("8 GPU(s)    1 steps in all, 0.2 an epoch of 32 samples, ") for line in lines)
    assert "replies     8 of clip first: any engine speaks them" in lines
    assert f"{TEXTS[0]}<|eot_id|>" in told  # the prompt; the reply is its clip, and its end
    trained = "and trained on '<|audio_out_bos|><|audio_eos|><|eot_id|>': 3 labels of text, 31"
    assert trained in told and "trainable   204,800 parameters" in told
    assert "largest     micro-batch: 4 samples, " in told
    assert "0.00 GB of GPU memory at most" in told
    start = lines.index("worth a look, though all of it would train: 5") + 1
    doubts = {line.split(": ")[0].strip(): line for line in lines[start : start + 5]}
    assert lines[start + 5].startswith("trainable ")  # told before the base is loaded and anything large run
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
    [found] = validate_pipeline.find_odd_texts([entry_of(text)], {})
    assert found.startswith("  entry 0: its text has ") and "looks like a fault" in found


@pytest.mark.parametrize("text", ["صباح الخير", "Ça va? Où? à côté", "R&D; a & b", "a\nb\tc", "50 % ×"])
def test_texts_that_are_not_odd(text):
    assert not validate_pipeline.find_odd_texts([entry_of(text)], {})


def test_presentation_forms():
    """All letters that NFKC would change, and no other sign: ornate brackets and the basmala stay."""
    assert not validate_pipeline.find_odd_texts([entry_of("\ufd3e صباح \ufd3f \ufdfd \ufd40")], {})
    for letter in "\ufebb\ufb50\ufdfa\ufefc":
        [found] = validate_pipeline.find_odd_texts([entry_of(f"قال {letter}")], {})
        assert repr(letter) in found and "unicodedata.normalize('NFKC', text)" in found
    for code in (*range(0xFB50, 0xFE00), *range(0xFE70, 0xFEFD)):
        is_found = bool(validate_pipeline.PRESENTATION_FORM.search(chr(code)))
        is_changed = unicodedata.normalize("NFKC", chr(code)) != chr(code)
        if unicodedata.category(chr(code)) not in ("Cn", "Sk") and chr(code) not in "\ufdcf\ufe73":
            assert is_found == is_changed, hex(code)


def entry_of(text):
    turns = [("user", text), ("assistant", "yes")]
    return ChatMLSample([Message(role, [TextContent(part)]) for role, part in turns])


def test_references_in_the_other_layout(tiny):
    replies = [
        {"role": "assistant", "content": {"audio_url": f"clips/{name}.wav"}}
        for name in ("voice_a", "target_a")
    ]
    asked = {"role": "user", "content": "hello"}
    turns = [asked, replies[0], asked, replies[1]]
    code, told = preflight(tiny, [{"messages": turns, "start_index": 3}])
    assert code == 0 and "references  0:00:00 (h:mm:ss) in 1 distinct clips" in told


def test_a_reference_that_is_trained_is_told():
    """The second layout without its start_index trains the reference's reply as well."""
    turns = []
    for role, part in (("user", "a"), ("assistant", "r.wav"), ("user", "b"), ("assistant", "t.wav")):
        turns.append(Message(role, [TextContent(part) if role == "user" else AudioContent(part)]))
    frames = {"r.wav": 25, "t.wav": 25}
    masked, unmasked = ChatMLSample(turns, start_index=3), ChatMLSample(turns)
    found = validate_pipeline.find_odd_texts([masked, unmasked], frames)
    assert found == ["  entry 1: trains 2 turns: start_index is not set"]


def test_text_alone_is_legal(tiny):
    code, told = preflight(
        tiny,
        [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}],
    )
    assert (
        code == 0
        and "references  0:00:00 (h:mm:ss) in 0 distinct clips" in told
        and "targets     0:00:00 (h:mm:ss) in 0" in told
    )


def test_what_is_to_be_fixed_ends_the_list(tiny, entries):
    """A broken manifest is told before anything is loaded; its exit code is 1, and there is no traceback."""
    missing = voice_cloning_entry("hello", "clips/voice_a.wav", "clips/none.wav")
    code, told = preflight(tiny, [*entries, missing, {"messages": []}])
    said = told[told.index("error: ") :].splitlines()
    assert code == 1 and "Traceback" not in told and "preflight.json: 2 problem(s)" in said[0]
    assert said[1].startswith("  entry 3: messages.2: expected type audio, a file that is there")
    assert "clips/none.wav" in said[1]
    assert said[2] == "  entry 4: has no assistant turn at or after start_index 0"


def test_kinds_of_replies_and_what_they_mean_for_engines(tiny, entries):
    """The user's own layout has text, then the clip: engines that force audio at once are silently wrong."""
    both = json.loads(json.dumps(entries[0]))
    both["messages"][-1]["content"].insert(0, {"type": "text", "text": "so be it"})
    text = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    code, told = preflight(tiny, [entries[0], both, text, text])
    assert code == 0, told
    assert {line for line in told.splitlines() if line.startswith("replies ")} == {
        "replies     1 of clip first: any engine speaks them",
        "replies     1 of text, then clip: give an engine that speaks at once the text first, or it is "
        "silently wrong (README)",
        "replies     2 of text only: train no voice",
    }


def test_doubts_and_the_longest_entry_are_told_before_the_base_is_loaded(tiny, doubtful):
    """So that they are known where memory runs out: here the base's weights are garbage."""
    broken = tiny / "broken_model"
    shutil.copytree(tiny / "model", broken, dirs_exist_ok=True)
    [weights] = broken.glob("*.safetensors")
    weights.write_bytes(b"garbage" * 100)
    manifest = tiny / "preflight.json"
    manifest.write_text(json.dumps(doubtful))
    flags = ["--train_manifest", manifest, "--base_ckpt", broken, "--audio_tokenizer", tiny / "codec"]
    done = launcher.run("validate_pipeline.py", *flags)
    assert done.returncode == 1 and "its weights cannot be loaded" in done.stderr
    assert "the longest entry, 5, has " in done.stdout and "  entry 5: its text has 186" in done.stdout


def test_steps_in_all(tiny, entries):
    """As many as trainer.py makes of the same flags; and a word that few of them teach little."""
    code, told = preflight(tiny, entries, "--epochs=7", "--batch_size=2", "--grad_accum=1")
    assert code == 0 and "1 GPU(s)    11 steps in all, 1.5 an epoch of 2 samples, " in told
    assert "8 GPU(s)    2 steps in all, 0.2 an epoch of 16 samples, " in told
    assert "under a few hundred steps teach little (not measured)\n" in told
    code, told = preflight(tiny, entries, "--max_steps=99")
    assert code == 0 and told.count(" 99 steps in all, ") == 2


def test_the_largest_micro_batch_runs_as_trainer_wraps_it(tiny, entries, monkeypatch):
    """Catches options of DDP of its own: the trainer's do not send the frozen base, and save memory."""
    manifest = tiny / "preflight.json"
    manifest.write_text(json.dumps(entries))
    args = trainer.parse_args(
        [
            f"--train_manifest={manifest}",
            f"--base_ckpt={tiny}/model",
            f"--audio_tokenizer={tiny}/codec",
            "--output_dir=unused",
            "--num_workers=0",
        ]
    )
    wrap, wrapped = trainer.wrap_in_ddp, []
    monkeypatch.setattr(trainer, "wrap_in_ddp", lambda *args: wrapped.append(wrap(*args)) or wrapped[-1])
    validate_pipeline.preflight(args, CPU)
    [(model, _, _)] = wrapped
    assert not model.broadcast_buffers and model.gradient_as_bucket_view


@pytest.mark.parametrize("flag", ["--train_manifest", "--adapter"])
def test_keep_goes_with_no_other_flag(tmp_path, flag):
    """Catches a preflight or comparison that leaves --keep out without a word."""
    done = launcher.run("validate_pipeline.py", "--keep", tmp_path / "kept", flag, tmp_path / "other")
    assert done.returncode == 2 and "error: --keep takes no other flag" in done.stderr
    assert not (tmp_path / "kept").exists()
