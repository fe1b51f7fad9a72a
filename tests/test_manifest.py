"""What load_manifest takes and refuses; what upstream then makes of it. No model, no codec."""

import json

import pytest
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from transformers import AutoTokenizer

from dataset import PipelineError, clips_of, load_manifest

CLIP = {"type": "audio", "audio_url": "clips/voice_a.wav"}
REPLY = {"role": "assistant", "content": [CLIP]}


def entry(*turns, **more):
    return {"messages": list(turns) or [{"role": "user", "content": "hello"}, REPLY], **more}


def user(content):
    return entry({"role": "user", "content": content}, REPLY)


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
    "not an object": (["hello"], "entry 0: is not ChatML"),
    "no messages": ([{"text": "hello"}], "entry 0: is not ChatML"),
    "messages no list": ([{"messages": {"role": "user"}}], "entry 0: is not ChatML"),
    "no turn": ([entry(), {"messages": []}], "entry 1: has no assistant turn"),
    "turn no object": ([entry("hello", REPLY)], "messages[0]: 'hello' is no Message"),
    "no role": ([entry({"content": "hello"}, REPLY)], "messages[0]: .* is no Message"),
    "no content": ([entry({"role": "user"}, REPLY)], "messages[0]: 'None' is no AudioContent"),
    "content null": ([user(None)], "'None' is no AudioContent"),
    "content number": ([user(7)], "'7' is no AudioContent"),
    "part number": ([user([7])], "'7' is no AudioContent"),
    "nested list": ([user([["hello"]])], "is no AudioContent"),
    "inline": ([user({**CLIP, "audio_url": "placeholder", "raw_audio": "UklGRg=="})], "save the clip"),
    "text number": ([user({"type": "text", "text": 7})], "wrong value type for field .text."),
    "unknown turn field": ([entry({**REPLY, "name": "b"})], "can not match .name."),
    "unknown audio field": ([user({**CLIP, "speaker": "b"})], "can not match .speaker."),
    "text and audio": ([user({**CLIP, "text": "a"})], "can not match .audio_url."),
    "audio without url": ([user({"type": "audio", "raw_audio": "UklGRg=="})], "is no AudioContent"),
    "audio_url null": ([user({"type": "audio", "audio_url": None})], "value type for field .audio_url."),
    "duration string": ([user({**CLIP, "duration": "3 s"})], "wrong value type for field .duration."),
    "row_id string": ([user({**CLIP, "row_id": "3"})], "wrong value type for field .row_id."),
    # upstream takes each of the next ones in silence, and wrongly (DESIGN, trap 2)
    "role tool with audio": ([entry({"role": "tool", "content": [CLIP]}, REPLY)], "role is 'tool'"),
    "type image": ([user({"type": "image", "text": "a"})], "content of type 'image' has the fields of text"),
    "type audio, text": ([user({"type": "audio", "text": "a"})], "type 'audio' has the fields of text"),
    "type text, audio": ([user({**CLIP, "type": "text"})], "type 'text' has the fields of audio"),
    "literal placeholder": ([user("say <|AUDIO_OUT|> now")], r"text holds '<\|AUDIO_OUT\|>'"),
    "literal end of turn": ([user("bye<|eot_id|>")], r"text holds '<\|eot_id\|>'"),
    "placeholder in recipient": ([entry({**REPLY, "recipient": "<|AUDIO|>"})], r"text holds '<\|AUDIO\|>'"),
    "lone surrogate": ([user("a\ud800")], "text holds '.ud800'"),
    "recipient of a user": ([entry({**REPLY, "role": "user", "recipient": "bob"}, REPLY)], "a recipient"),
    "recipient, masked": ([entry({**REPLY, "recipient": "bob"}, REPLY, start_index=1)], "a recipient"),
    "recipient number": ([entry({**REPLY, "recipient": 7})], "wrong value type for field .recipient."),
    "offset": ([user({**CLIP, "offset": 0.5})], "voice_a.wav: has an offset"),
    "placeholder alone": ([user({**CLIP, "audio_url": "placeholder"})], "'placeholder'; save the clip"),
    "empty url alone": ([user({**CLIP, "audio_url": ""})], "''; save the clip as a file"),
    "no assistant": ([entry({"role": "user", "content": "hello"})], "entry 0: has no assistant turn"),
    "all masked": ([entry(REPLY, start_index=1)], "has no assistant turn at or after start_index 1"),
    "start_index string": ([entry(start_index="1")], '"start_index" is .1.; expected'),
    "start_index empty": ([entry(start_index="")], '"start_index" is ..; expected'),
    "start_index float": ([entry(start_index=1.5)], '"start_index" is 1.5; expected'),
    "start_index negative": ([entry(start_index=-1)], '"start_index" is -1; expected'),
    "missing clip": ([user({**CLIP, "audio_url": "clips/none.wav"})], "clips/none.wav: no such file"),
    "clip is a folder": ([user({**CLIP, "audio_url": "clips"})], "clips: no such file"),
    "url": ([user({**CLIP, "audio_url": "https://a.org/b.wav"})], "https://a.org/b.wav: no such file"),
    "NUL in a path": ([user({**CLIP, "audio_url": "a\0b.wav"})], "no such file"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entries_are_refused_by_name(load, name):
    content, message = BAD_ENTRIES[name]
    with pytest.raises(PipelineError, match="entry") as error:
        load(content)
    error.match(message.replace("messages[0]", r"messages\[0\]"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no entry"),
        ("[]", "holds no entry"),
        (" \n\n", "holds no entry"),
        ("[1,", "a JSON array, or JSONL .*line 1"),
        ('{"messages": 1}\n{"mess', "JSONL .*line 2"),
        ("[" * 100_000, "a JSON array, or JSONL .*recursion"),
        ("<xml/>", "a JSON array, or JSONL .*line 1"),
    ],
)
def test_not_a_manifest(load, text, message):
    with pytest.raises(PipelineError, match=message):
        load(text)


def test_unreadable_manifests(tmp_path):
    (tmp_path / "latin.json").write_bytes("[{'é'}]".encode("latin-1"))
    for name in ("missing.json", "latin.json", "."):
        with pytest.raises(PipelineError, match="cannot be read as UTF-8"):
            load_manifest(tmp_path / name)


def test_all_bad_entries_are_listed_up_to_twenty(load):
    with pytest.raises(PipelineError) as error:
        load([entry()] * 3 + [user({**CLIP, "offset": 1.0})] * 25)
    lines = str(error.value).splitlines()
    assert "25 problem(s)" in lines[0] and lines[1].startswith("  entry 3: messages[0]")
    assert len(lines) == 22 and lines[-1] == "  ... and 5 more"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_array_and_jsonl_with_and_without_bom_and_crlf(load, encoding, newline):
    some = [user("صباح الخير"), user("line\u2028separator")]
    lines = newline.join(json.dumps(one, ensure_ascii=False) for one in some) + newline
    array = json.dumps(some, ensure_ascii=False, indent=2).replace("\n", newline)
    assert load(lines, encoding) == load(array, encoding)
    assert [clips_of(one)[0][0] for one in load(lines, encoding)] == ["assistant", "assistant"]


GOOD_CONTENTS = {
    "string": "hello",
    "list of strings": ["hello", "there"],
    "text": {"type": "text", "text": "hello"},
    "type left out": [{"text": "hello"}, {"audio_url": "clips/voice_a.wav"}],
    "scene marks": "<|scene_desc_start|>quiet<|scene_desc_end|> <SE>[laugh]</SE>",
    "metadata": {**CLIP, "duration": 3, "row_id": 1, "offset": None, "raw_audio": None},
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
