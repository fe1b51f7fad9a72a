"""Throw manifests at the loader: nothing but UserError may come out, and what it takes upstream takes.

    python -m tests.manual.fuzz_manifest [MINUTES]

Run by hand. The entries are real ones with parts of them replaced, removed, repeated or renamed at random.
"""

import copy
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset import UserError, load_manifest
from tests.support.tiny_checkpoint import make_tokenizer, voice_cloning_entry

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [
            "assistant",
            "user",
            "system",
            "tool",
            "a.wav",
            "none.wav",
            "",
            "placeholder",
            "<|AUDIO|>",
            "<|eot_id|>",
            "text",
            "audio",
            "image",
            "UklGRg==",
            "https://x.org/a.wav",
            "\ud800",
            "a\0b",
            "x" * 999,
        ]
    ),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            [
                "messages",
                "role",
                "content",
                "type",
                "text",
                "audio_url",
                "raw_audio",
                "offset",
                "duration",
                "row_id",
                "recipient",
                "start_index",
                "speaker",
                "misc",
            ]
        )
        | st.text(max_size=5),
        inner,
        max_size=5,
    ),
    max_leaves=8,
)


def places(value, path=()):
    """Every (container, key) in a nested value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(value, key), *places(item)]]


def mangle(entry, draws):
    for seed, value in draws:
        rng = random.Random(seed)
        container, key = rng.choice(places(entry) or [({"": 0}, "")])
        how = rng.randrange(4)
        if how == 0 and isinstance(container, dict):
            container[rng.choice(["text", "audio_url", "recipient", "start_index", "role"])] = value
        elif how == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif how == 2:
            del container[key]
        else:
            container[key] = value
    return entry


def main(minutes):
    folder, told = Path(tempfile.mkdtemp()), {"taken": 0, "refused": 0}
    (folder / "a.wav").touch()
    tokenizer, path = make_tokenizer(folder / "tokenizer"), folder / "train.json"
    end = time.monotonic() + 60 * minutes

    def attempt(content):
        path.write_bytes(content)
        try:
            entries = load_manifest(path)
        except UserError:
            told["refused"] += 1
            return
        told["taken"] += 1
        for entry in entries:
            input_ids, labels, clips, _ = prepare_chatml_sample(entry, tokenizer)
            assert input_ids is not None and any(label != -100 for label in labels), entry
            audio = [part for turn in entry.messages for part in turn.content if part.type == "audio"]
            assert len(clips) == len(audio), entry

    common = settings(
        max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    @common
    @given(
        st.lists(st.lists(st.tuples(st.integers(0, 2**32), ANYTHING), max_size=4), min_size=1, max_size=3),
        st.booleans(),
    )
    def mangled(draws, jsonl):
        entries = [mangle(voice_cloning_entry("hello", "a.wav", "a.wav"), draw) for draw in draws]
        text = "\n".join(map(json.dumps, entries)) if jsonl else json.dumps(entries)
        attempt(text.encode())

    @common
    @given(ANYTHING.map(json.dumps) | st.text(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    def texts(text, encoding):
        attempt(text.encode(encoding, errors="replace"))

    @common
    @given(st.binary(max_size=200))
    def noise(content):
        attempt(content)

    while time.monotonic() < end:
        mangled(), texts(), noise()
        print(told, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
