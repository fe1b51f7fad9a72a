"""What load_manifest takes and refuses; what upstream then makes of it. No model, no codec."""

import json
import os

import pytest
import torch
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from transformers import AutoTokenizer

from dataset import UserError, clips_of, load_manifest, user_error

CLIP = {"type": "audio", "audio_url": "clips/voice_a.wav"}
REPLY = {"role": "assistant", "content": [CLIP]}


def entry(*turns, **more):
    return {"messages": list(turns) or [{"role": "user", "content": "hello"}, REPLY], **more}


def user(content):
    return entry({"role": "user", "content": content}, REPLY)


def reply(content):
    return entry({"role": "assistant", "content": content})


@pytest.fixture
def load(tiny, tmp_path):
    """Load a manifest given as objects or as text; its clips are the tiny checkpoint's."""
    (tmp_path / "clips").symlink_to(tiny / "clips")

    def load(content, encoding="utf-8"):
        path = tmp_path / "train.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(text.encode(encoding, errors="surrogatepass"))
        return load_manifest(path)

    return load


BAD_ENTRIES = {
    "a clip without a path": ([user([{"type": "audio"}])], "AudioContent.audio_url: Field required"),
    "not an object": (["hello"], "entry 0: Input should be an object; seen: 'hello'"),
    "no messages": ([{"text": "hello"}], "entry 0.messages: Field required; seen: .'text'"),
    "messages no list": ([{"messages": {"role": "user"}}], "entry 0.messages: .*array"),
    "no turn": ([entry(), {"messages": []}], "entry 1: has no assistant turn"),
    "turn no object": ([entry("hello", REPLY)], "entry 0.messages.0: .*object; seen: 'hello'"),
    "no role": ([entry({"content": "hello"}, REPLY)], "messages.0.role: Field required"),
    "no content": ([entry({"role": "user"}, REPLY)], "messages.0.content: Field required"),
    "content null": ([user(None)], "messages.0.content.*seen: None"),
    "content number": ([user(7)], "content.*seen: 7"),
    "part number": ([user([7])], "content.*seen: 7"),
    "nested list": ([user([["hello"]])], "content.*hello"),
    "inline": (
        [user({**CLIP, "audio_url": "placeholder", "raw_audio": "UklGRg=="})],
        "messages.0: expected type audio, a file",
    ),
    "text number": ([user({"type": "text", "text": 7})], "text: .*valid string; seen: 7"),
    "unknown turn field": ([entry({**REPLY, "name": "b"})], "messages.0.name: Unexpected"),
    "unknown audio field": ([user({**CLIP, "speaker": "b"})], "speaker: Unexpected"),
    "text and audio": ([user({**CLIP, "text": "a"})], "Unexpected keyword"),
    "no text, no audio": ([user({})], "Field required"),
    "audio without url": ([user({"type": "audio", "raw_audio": "UklGRg=="})], "messages.0.content"),
    "audio_url null": ([user({"type": "audio", "audio_url": None})], "audio_url"),
    "duration": ([user({**CLIP, "duration": 3})], "inference reads whole files, cut it before"),
    "row_id string": ([user({**CLIP, "row_id": "3"})], "row_id"),
    "role tool with audio": (
        [entry({"role": "tool", "content": [CLIP]}, REPLY)],
        "expected system, user or assistant, no recipient: .*'tool'",
    ),
    "type image": ([user({"type": "image", "text": "a"})], "expected type text, no special token.*image"),
    "type audio, text": (
        [user({"type": "audio", "text": "a"})],
        "expected type text, no special token.*audio",
    ),
    "type text, audio, trained": ([reply({**CLIP, "type": "text"})], "expected type audio.*type='text'"),
    "type text, audio": ([user({**CLIP, "type": "text"})], "messages.0: .*type='text'"),
    "literal placeholder": (
        [user("say <|AUDIO_OUT|> now")],
        "expected type text, no special token.*AUDIO_OUT",
    ),
    "literal end of turn": ([user("bye<|eot_id|>")], "expected type text, no special token.*eot_id"),
    "lone surrogate": ([user("a\ud800")], "Invalid JSON: .*column"),
    "recipient of a user": (
        [entry({**REPLY, "role": "user", "recipient": "bob"}, REPLY)],
        "no recipient: .*'bob'",
    ),
    "recipient, masked": ([entry({**REPLY, "recipient": "bob"}, REPLY, start_index=1)], "no recipient"),
    "recipient number": ([entry({**REPLY, "recipient": 7})], "recipient: .* valid string; seen: 7"),
    "offset": ([user({**CLIP, "offset": 0.5})], "inference reads whole files, cut it before"),
    "placeholder alone": (
        [user({**CLIP, "audio_url": "placeholder"})],
        "expected type audio, a file that is there",
    ),
    "empty url alone": ([user({**CLIP, "audio_url": ""})], "expected type audio, a file that is there"),
    "no assistant": ([entry({"role": "user", "content": "hello"})], "entry 0: has no assistant turn"),
    "all masked": ([entry(REPLY, start_index=1)], "at or after start_index 1"),
    "start_index string": ([entry(start_index="1")], "entry 0.start_index: .*valid integer"),
    "start_index empty": ([entry(start_index="")], "entry 0.start_index"),
    "start_index float": ([entry(start_index=1.5)], "entry 0.start_index"),
    "start_index bool": ([entry(start_index=True)], "entry 0.start_index"),
    "start_index negative": ([entry(start_index=-1)], "at or after start_index -1"),
    "unknown entry field": ([entry(start_idx=1)], "entry 0.start_idx: Unexpected"),
    "missing clip": (
        [user({**CLIP, "audio_url": "clips/none.wav"})],
        "messages.0: expected type audio, a file that is there; seen: .*clips/none.wav",
    ),
    "clip is a folder": (
        [user({**CLIP, "audio_url": "clips"})],
        "expected type audio, a file that is there.*clips",
    ),
    "url": (
        [user({**CLIP, "audio_url": "https://a.org/b.wav"})],
        "expected type audio, a file that is there.*https://a.org/b.wav",
    ),
    "NUL in a path": ([user({**CLIP, "audio_url": "a\0b.wav"})], "expected type audio, a file that is there"),
    "path too long": ([user({**CLIP, "audio_url": "a" * 9999})], "expected type audio, a file that is there"),
    "reply of no part": ([reply([])], "a trained turn needs a clip or words"),
    "reply empty": ([reply("")], "a trained turn needs a clip or words"),
    "reply of blanks": ([reply([" \n", {"text": "\u3000"}])], "a trained turn needs a clip or words"),
    "later reply empty": (
        [entry(REPLY, REPLY, {**REPLY, "content": ""}, start_index=1)],
        "messages.2: a trained turn",
    ),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entries_are_refused_by_name(load, name):
    content, message = BAD_ENTRIES[name]
    with pytest.raises(UserError, match=f"entry .*{message.removeprefix('entry ')}"):
        load(content)


GOOD_REPLIES = {
    "masked, empty": entry({**REPLY, "content": ""}, {**REPLY, "content": []}, REPLY, start_index=2),
    "name in a sentence": reply("Listen to voice_a.wav"),
    "text, clip": reply(["", CLIP]),
    "one sign": reply("؟"),
    "recipient": entry({**REPLY, "recipient": "bob"}),
    "unused": entry(speaker="a", misc={"any": [1]}, start_index=None),
}


@pytest.mark.parametrize("name", GOOD_REPLIES)
def test_good_replies_are_taken(load, name):
    assert load([GOOD_REPLIES[name]])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no entry"),
        ("[]", "holds no entry"),
        (" \n\n", "holds no entry"),
        ("[1,", "Invalid JSON: EOF .*line 1"),
        ('{"messages": 1}\n{"mess', "Invalid JSON: .*line 2"),
        ("[" * 100_000, "Invalid JSON: .*recursion"),
        ("<xml/>", "Invalid JSON: .*line 1"),
        ('\n{"messages": []}\n\n{"messages": [}\n{"messages": []}', "Invalid JSON: .*line 4"),
    ],
)
def test_not_a_manifest(load, text, message):
    with pytest.raises(UserError, match=message):
        load(text)


def test_unreadable_manifests(tmp_path):
    (tmp_path / "latin.json").write_bytes("[{'é'}]".encode("latin-1"))
    for name in ("missing.json", "latin.json", "."):
        with pytest.raises(UserError, match="cannot be read; expected JSON, in UTF-8"):
            load_manifest(tmp_path / name)


def test_all_bad_entries_are_listed_up_to_twenty(load):
    with pytest.raises(UserError) as error:
        load([entry()] * 3 + [user({**CLIP, "offset": 1.0})] * 25)
    lines = str(error.value).splitlines()
    assert "25 problem(s), at most 20 are shown" in lines[0] and lines[1].startswith("  entry 3: messages.0")
    assert len(lines) == 21


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_array_and_jsonl_with_and_without_bom_and_crlf(load, encoding, newline):
    some = [user("صباح الخير"), user("line\u2028separator")]
    lines = newline.join(json.dumps(one, ensure_ascii=False) for one in some) + newline
    array = json.dumps(some, ensure_ascii=False, indent=2).replace("\n", newline)
    blank = (newline + " " + newline).join(["", *lines.split(newline)])
    assert load(lines, encoding) == load(array, encoding) == load(blank, encoding)
    assert [len(clips_of(one)) for one in load(lines, encoding)] == [1, 1]
    over_several_lines = json.dumps(some[1], ensure_ascii=False, indent=2).replace("\n", newline)
    assert load(over_several_lines, encoding) == load(array, encoding)[1:]


GOOD_CONTENTS = {
    "string": "hello",
    "list of strings": ["hello", "there"],
    "text": {"type": "text", "text": "hello"},
    "type left out": [{"text": "hello"}, {"audio_url": "clips/voice_a.wav"}],
    "scene marks": "<|scene_desc_start|>quiet<|scene_desc_end|> <SE>[laugh]</SE>",
    "metadata": {**CLIP, "duration": None, "row_id": 1, "offset": None, "raw_audio": None},
    "empty": [],
}


@pytest.mark.parametrize("name", GOOD_CONTENTS)
def test_what_is_taken_is_what_upstream_reads(load, tiny, name):
    """Catches a check that lets through what upstream refuses, and a normalisation that changes the ids."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    raw = entry({"role": "user", "content": GOOD_CONTENTS[name]}, REPLY, start_index=0, speaker="a", misc={})
    ids, labels, clips, _ = prepare_chatml_sample(json.loads(json.dumps(raw)), tokenizer)
    [checked] = load([raw])
    checked_ids, checked_labels, checked_clips, _ = prepare_chatml_sample(checked, tokenizer)
    assert ids is not None and (ids, labels) == (checked_ids, checked_labels)
    assert len(clips) == len(checked_clips) == len(clips_of(checked))
    assert all(os.path.isabs(path) and os.path.isfile(path) for path in clips_of(checked))


def test_dot_dot_after_a_symlink_is_the_operating_systems(tmp_path):
    """Text alone would make here.wav of link/../here.wav: another file, or none."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    for name in ("far/there.wav", "here.wav"):
        (tmp_path / name).touch()
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps([reply({"audio_url": "link/../there.wav"})]))
    [path] = clips_of(load_manifest(manifest)[0])
    assert os.path.samefile(path, tmp_path / "far" / "there.wav")
    manifest.write_text(json.dumps([reply({"audio_url": "link/../here.wav"})]))
    with pytest.raises(
        UserError,
        match="expected type audio, a file that is there; seen: .*link/../here.wav",
    ):
        load_manifest(manifest)
    (tmp_path / "far" / "train.json").write_text(json.dumps([reply({"audio_url": "there.wav"})]))
    [path] = clips_of(load_manifest(tmp_path / "link" / ".." / "train.json")[0])
    assert os.path.samefile(path, tmp_path / "far" / "there.wav")


def test_user_error_takes_libraries_errors_and_nothing_else():
    with pytest.raises(UserError, match=r"^file a \(KeyError: 'b'\)$") as error, user_error("file a"):
        raise KeyError("b")
    assert isinstance(error.value.__cause__, KeyError)
    for other in (UserError("inner"), KeyError("b"), KeyboardInterrupt("stop")):
        with pytest.raises(type(other), match="^(inner|'b'|stop)$"), user_error("a", torch.OutOfMemoryError):
            raise other
