"""What load_manifest takes and refuses; what upstream then makes of it. No model, no codec."""

import copy
import json
import os
import unicodedata

import pytest
import torch
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from transformers import AutoTokenizer

from dataset import UserError, check_entry, clips_of, load_manifest, user_error

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


NO_PART = "content[0]: expected text, or an object with text or audio_url; seen: "
BAD_ENTRIES = {
    "not an object": (["hello"], "entry 0: Input should be a valid dictionary .*; seen: 'hello'"),
    "no messages": ([{"text": "hello"}], "entry 0: messages: Field required"),
    "messages no list": ([{"messages": {"role": "user"}}], "entry 0: messages: .* valid list; seen: {'role'"),
    "no turn": ([entry(), {"messages": []}], "entry 1: has no assistant turn"),
    "turn no object": ([entry("hello", REPLY)], "messages[0]: .* valid dictionary .*; seen: 'hello'"),
    "no role": ([entry({"content": "hello"}, REPLY)], "messages[0]: role: Field required"),
    "no content": ([entry({"role": "user"}, REPLY)], "messages[0]: content: Field required"),
    "content null": ([user(None)], f"messages[0]: {NO_PART}None"),
    "content number": ([user(7)], f"{NO_PART}7"),
    "part number": ([user([7])], f"{NO_PART}7"),
    "nested list": ([user([["hello"]])], f"{NO_PART}['hello']"),
    "inline": ([user({**CLIP, "audio_url": "placeholder", "raw_audio": "UklGRg=="})], "save the clip"),
    "text number": (
        [user({"type": "text", "text": 7})],
        "text: text: Input should be a valid string; seen: 7",
    ),
    "unknown turn field": ([entry({**REPLY, "name": "b"})], "messages[0]: name: unknown key; seen: 'b'"),
    "unknown audio field": ([user({**CLIP, "speaker": "b"})], "audio: speaker: unknown key; seen: 'b'"),
    "text and audio": ([user({**CLIP, "text": "a"})], "audio: text: unknown key; seen: 'a'"),
    "no text, no audio": ([user({})], "audio: audio_url: Field required"),
    "audio without url": ([user({"type": "audio", "raw_audio": "UklGRg=="})], "audio_url: Field required"),
    "audio_url null": (
        [user({"type": "audio", "audio_url": None})],
        "audio_url: .* valid string; seen: None",
    ),
    "duration": ([user({**CLIP, "duration": 3})], "duration: inference reads whole files: cut the clip"),
    "row_id string": ([user({**CLIP, "row_id": "3"})], "row_id: .* valid integer; seen: '3'"),
    # upstream takes each of the next ones in silence, and wrongly (DESIGN, trap 2)
    "role tool with audio": ([entry({"role": "tool", "content": [CLIP]}, REPLY)], "role: .*; seen: 'tool'"),
    "type image": ([user({"type": "image", "text": "a"})], "'image' .* expected tags: 'text', 'audio'"),
    "type audio, text": ([user({"type": "audio", "text": "a"})], "audio: text: unknown key"),
    "type text, audio": ([user({**CLIP, "type": "text"})], "text: audio_url: unknown key"),
    "literal placeholder": ([user("say <|AUDIO_OUT|> now")], "text holds '<|AUDIO_OUT|>'"),
    "literal end of turn": ([user("bye<|eot_id|>")], "text holds '<|eot_id|>'"),
    "placeholder in recipient": ([entry({**REPLY, "recipient": "<|AUDIO|>"})], "text holds '<|AUDIO|>'"),
    "lone surrogate": ([user("a\ud800")], "text holds '.ud800'"),
    "recipient of a user": ([entry({**REPLY, "role": "user", "recipient": "bob"}, REPLY)], "a recipient"),
    "recipient, masked": ([entry({**REPLY, "recipient": "bob"}, REPLY, start_index=1)], "a recipient"),
    "recipient number": ([entry({**REPLY, "recipient": 7})], "recipient: .* valid string; seen: 7"),
    "offset": ([user({**CLIP, "offset": 0.5})], "offset: inference reads whole files: cut the clip"),
    "placeholder alone": ([user({**CLIP, "audio_url": "placeholder"})], "save .* seen: 'placeholder'"),
    "empty url alone": ([user({**CLIP, "audio_url": ""})], "save the clip as a file .* seen: ''"),
    "no assistant": ([entry({"role": "user", "content": "hello"})], "entry 0: has no assistant turn"),
    "all masked": ([entry(REPLY, start_index=1)], "has no assistant turn at or after start_index 1"),
    "start_index string": ([entry(start_index="1")], "entry 0: start_index: .* valid integer; seen: '1'"),
    "start_index empty": ([entry(start_index="")], "start_index: .* valid integer; seen: ''"),
    "start_index float": ([entry(start_index=1.5)], "start_index: .* valid integer; seen: 1.5"),
    "start_index bool": ([entry(start_index=True)], "start_index: .* valid integer; seen: True"),
    "start_index negative": ([entry(start_index=-1)], "start_index: .* or equal to 0; seen: -1"),
    "unknown entry field": ([entry(start_idx=1)], "entry 0: start_idx: unknown key; seen: 1"),
    "missing clip": (
        [user({**CLIP, "audio_url": "clips/none.wav"})],
        "messages[0]: content[0]: audio: audio_url: "
        "no such file, from the manifest's folder; seen: 'clips/none.wav'",
    ),
    "clip is a folder": ([user({**CLIP, "audio_url": "clips"})], "no such file, .* seen: 'clips'"),
    "url": ([user({**CLIP, "audio_url": "https://a.org/b.wav"})], "no such file, .*'https://a.org/b.wav'"),
    "NUL in a path": ([user({**CLIP, "audio_url": "a\0b.wav"})], "no such file"),
    "path too long": ([user({**CLIP, "audio_url": "a" * 9999})], "no such file"),
    # each of these would train to say nothing, or to say a path
    "path in a prompt": (
        [user("clips/voice_a.wav")],
        "messages[0]: a text is a file's name, give it as audio_url",
    ),
    "url in a reply": ([reply("https://a.org/b.mp3?dl=1")], "messages[0]: a text is a file's name"),
    "reply of fillers": ([reply("\u2800\u3164")], "a trained turn needs a clip or words"),
    "reply of no part": ([reply([])], "messages[0]: a trained turn needs a clip or words; seen: []"),
    "reply empty": ([reply("")], "messages[0]: a trained turn needs a clip or words; seen: ['']"),
    "reply of blanks": ([reply([" \n", {"text": "\u3000"}])], "a trained turn needs a clip or words"),
    "reply invisible": ([reply("\u200f")], "a trained turn needs a clip or words; seen: ['.u200f']"),
    "later reply empty": (
        [entry(REPLY, REPLY, {**REPLY, "content": ""}, start_index=1)],
        "messages[2]: a trai",
    ),
    "reply a clip's path": (
        [reply("clips/voice_a.wav")],
        "messages[0]: a text is a file's name, .* audio_url",
    ),
    "reply a lost path": ([reply([CLIP, " b/c-1.MP3\n"])], "messages[0]: a text is a file's name"),
    "reply any file": ([reply("train.json")], "messages[0]: a text is a file's name"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entries_are_refused_by_name(load, name):
    content, message = BAD_ENTRIES[name]
    with pytest.raises(UserError, match="entry") as error:
        load(content)
    for special in "[]|":
        message = message.replace(special, f"\\{special}")
    error.match(message)


GOOD_REPLIES = {
    "masked, empty": entry({**REPLY, "content": ""}, {**REPLY, "content": []}, REPLY, start_index=2),
    "name in a sentence": reply("Listen to voice_a.wav"),
    "text, clip": reply(["", CLIP]),
    "one sign": reply("؟"),
    "recipient": entry({**REPLY, "recipient": "bob"}),
    "unused": entry(speaker=7, misc=[{"any": float("nan")}], start_index=None),
}


@pytest.mark.parametrize("name", GOOD_REPLIES)
def test_good_replies_are_taken(load, name):
    assert load([GOOD_REPLIES[name]])


REPEATED = {
    '{"messages": [], "messages": 7}': "entry 0: messages: .*; seen: ('given twice', [], 7)",
    '{"messages": [], "start_index": 1, "start_index": 1}': "entry 0: start_index: .*('given twice', 1, 1)",
    '{"messages": [{"role": "user", "content": "a", "content": "b"}]}': "content[0]: .*given twice', 'a', '",
    '{"messages": [{"role": "user", "role": "user", "content": "a"}]}': "messages[0]: role: .*('given twice'",
    '{"messages": [{"role": "user", "content": {"text": "a", "text": "a"}}]}': "text: text: .*given twice",
    '{"messages": [], "misc": {"a": {"b": 1, "b": 1}}}': "misc: .*: a: .*: b: .*('given twice', 1, 1)",
    '{"messages": [], "speaker": "a", "speaker": "a"}': "speaker: .*('given twice', 'a', 'a')",
}


@pytest.mark.parametrize("text", REPEATED)
def test_a_key_given_twice_is_refused_with_its_place(load, text):
    message = REPEATED[text]
    for special in "[]()":
        message = message.replace(special, f"\\{special}")
    for manifest in (text, f"[{text}]"):
        with pytest.raises(UserError, match=message):
            load(manifest)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no entry"),
        ("[]", "holds no entry"),
        (" \n\n", "holds no entry"),
        ("[1,", "neither a JSON array nor JSONL: .*line 1"),
        ('{"messages": 1}\n{"mess', "JSONL: .*line 2"),
        ("[" * 100_000, "JSONL: .*recursion"),
        ("<xml/>", "JSONL: .*line 1"),
        ("[" + "9" * 5000 + "]", "JSONL: Exceeds the limit"),
        (
            '\n\r\n{"messages": 1}\r\n\n \n{"messages": [}\n{"messages": 1}',
            r"Expecting value: line 6 column 15 ",
        ),
        ('{"a": 1}\n\n{"a": [\n{"a": 1}\n{"a": 1}\n', "line 5 column 1 .*, in what begins in line 3"),
        ('{"a": "\n"}', "Invalid control character at: line 1"),
    ],
)
def test_not_a_manifest(load, text, message):
    with pytest.raises(UserError, match=message) as error:
        load(text)
    assert len(str(error.value).splitlines()) == 1


def test_unreadable_manifests(tmp_path):
    (tmp_path / "latin.json").write_bytes("[{'é'}]".encode("latin-1"))
    for name in ("missing.json", "latin.json", "."):
        with pytest.raises(UserError, match="cannot be read as UTF-8"):
            load_manifest(tmp_path / name)


def test_all_bad_entries_are_listed_up_to_twenty(load):
    with pytest.raises(UserError) as error:
        load([entry()] * 3 + [user({**CLIP, "offset": 1.0})] * 25)
    lines = str(error.value).splitlines()
    assert "25 problem(s)" in lines[0] and lines[1].startswith("  entry 3: messages[0]")
    assert len(lines) == 22 and lines[-1] == "  ... and 5 more"


def test_each_problem_of_each_entry_is_one_line(load):
    long = {
        "messages": [{"role": "a\nb", "content": ["x\ny<|eot_id|>", {"te\nxt": "z" * 5000}]}],
        "new\nkey": 1,
    }
    empty = entry({**REPLY, "content": "\n"}, {"role": "user", "content": "a", "recipient": "b"}, REPLY)
    with pytest.raises(UserError) as error:
        load([long, entry(), empty])
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["  entry 0"] * 5 + ["  entry 2"] * 2
    assert max(map(len, lines)) < 400


def test_checks_leave_an_entry_as_it_is(tiny):
    raw = entry({"role": "user", "content": ["hello", CLIP]}, {**REPLY, "content": CLIP})
    before = copy.deepcopy(raw)
    assert check_entry(raw, str(tiny)) == [] and raw == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_array_and_jsonl_with_and_without_bom_and_crlf(load, encoding, newline):
    some = [user("صباح الخير"), user("line\u2028separator")]
    lines = newline.join(json.dumps(one, ensure_ascii=False) for one in some) + newline
    array = json.dumps(some, ensure_ascii=False, indent=2).replace("\n", newline)
    blank = (newline + " " + newline).join(["", *lines.split(newline)])
    assert load(lines, encoding) == load(array, encoding) == load(blank, encoding)
    assert [clips_of(one)[0][0] for one in load(lines, encoding)] == ["assistant", "assistant"]
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
    assert all(os.path.isabs(path) and os.path.isfile(path) for _, path in clips_of(checked))


def test_dot_dot_after_a_symlink_is_the_operating_systems(tmp_path):
    """Text alone would make here.wav of link/../here.wav: another file, or none."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    for name in ("far/there.wav", "here.wav"):
        (tmp_path / name).touch()
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps([reply({"audio_url": "link/../there.wav"})]))
    [(_, path)] = clips_of(load_manifest(manifest)[0])
    assert os.path.samefile(path, tmp_path / "far" / "there.wav")
    manifest.write_text(json.dumps([reply({"audio_url": "link/../here.wav"})]))
    with pytest.raises(UserError, match="no such file, from the manifest's folder; seen: 'link/../here.wav'"):
        load_manifest(manifest)
    (tmp_path / "far" / "train.json").write_text(json.dumps([reply({"audio_url": "there.wav"})]))
    [(_, path)] = clips_of(load_manifest(tmp_path / "link" / ".." / "train.json")[0])
    assert os.path.samefile(path, tmp_path / "far" / "there.wav")


@pytest.mark.parametrize("there, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_the_other_unicode_form_is_told(load, tmp_path, there, written):
    (tmp_path / unicodedata.normalize(there, "café.wav")).touch()
    name = unicodedata.normalize(written, "café.wav")
    with pytest.raises(UserError, match=f"no such file, from .*, but there is one .* Unicode's form {there}"):
        load([user({"audio_url": name})])
    with pytest.raises(UserError, match="from the manifest's folder; seen: "):
        load([user({"audio_url": f"other {name}"})])


def test_user_error_takes_libraries_errors_and_nothing_else():
    with pytest.raises(UserError, match=r"^file a \(KeyError: 'b'\)$") as error, user_error("file a"):
        raise KeyError("b")
    assert isinstance(error.value.__cause__, KeyError)
    for other in (UserError("inner"), torch.OutOfMemoryError("full"), KeyboardInterrupt("stop")):
        with pytest.raises(type(other), match="^(inner|full|stop)$"), user_error("file a"):
            raise other
