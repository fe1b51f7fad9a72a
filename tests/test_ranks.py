"""Any split, same gradient: one optimizer step cut in every way, on 1, 2 and 4 ranks (fidelity, property 2).

trainer.main runs once for each split (ranks.py). Every run resumes from a checkpoint whose LoRA B is not
zero, and takes one step at dropout 0. Its gradient is read from AdamW's first moment, its losses from
metrics.jsonl.
"""

import json
import shutil

import pytest
import soundfile
import torch

from tests.support import launcher, tiny_checkpoint
from tests.support.bounds import TINY, rounding_bound

POSITIONS = 1056  # of the step of the most samples, "mixed", without padding
MOMENTUM = 0.9  # AdamW: exp_avg' = 0.9 exp_avg + 0.1 gradient
SPLIT, SINGLE = ["--max_tokens", "400"], ["--max_tokens", "1"]  # a few samples a micro-batch; one
SPLITS = [  # manifest, ranks, batch_size, grad_accum, more flags; the first of each manifest is compared with
    ("mixed", 1, 8, 1, []),
    ("mixed", 1, 2, 4, SINGLE),
    ("mixed", 1, 8, 1, SPLIT),
    ("mixed", 2, 4, 1, []),
    ("mixed", 2, 1, 4, SINGLE),
    ("mixed", 2, 4, 1, SPLIT),
    ("mixed", 4, 2, 1, []),
    ("mixed", 4, 1, 2, SINGLE),
    ("mixed", 4, 2, 1, SPLIT),
    ("few", 1, 4, 1, []),
    ("few", 1, 1, 4, SINGLE),
    ("few", 2, 2, 1, []),
    ("few", 4, 1, 1, []),
    ("text", 1, 4, 1, []),
    ("text", 2, 2, 1, []),
    ("text", 4, 1, 1, []),
]


def entry(text, reply, *references):
    """One that asks with clips and `text`, and is answered by the contents in `reply`."""
    return {
        "messages": [
            {"role": "user", "content": [*map(clip, references), text]},
            {"role": "assistant", "content": reply},
        ]
    }


def clip(name):
    return {"audio_url": f"clips/{name}.wav"}


def write_manifests(folder):
    """Entries of very different length, from a line of text to two clips with 4.2 s.

    mixed: eight, one without a clip. few: three, so that on 4 ranks one has no sample and one only text.
    text: one without a clip, so that there is no audio label in the whole step and most ranks have no sample.
    """
    soundfile.write(folder / "clips/long.wav", tiny_checkpoint.speech_like(4.0, seed=50), 24_000)
    soundfile.write(folder / "clips/short.wav", tiny_checkpoint.speech_like(0.2, seed=51), 24_000)
    text_only = entry("من أنت؟", ["I am a text."])
    mixed = [
        entry("طويل " * 20, [clip("long")], "voice_a"),
        entry("a", [clip("short")]),
        text_only,
        entry("صباح الخير", [clip("target_a")], "voice_b"),
        entry("b", ["Yes", clip("target_b")], "voice_a"),
        entry("two", [clip("short"), clip("target_c")], "voice_a", "voice_b"),
        entry("c", [clip("target_b")]),
        entry("long again", [clip("long"), clip("short")]),
    ]
    for name, entries in dict(mixed=mixed, few=[mixed[1], text_only, mixed[4]], text=[text_only]).items():
        (folder / f"{name}.json").write_text(json.dumps(entries))


def flags(tiny, manifest, output_dir, steps, batch_size, accumulation, *more):
    """Of a run that logs each step and keeps its last one; nothing clips its gradient."""
    return [
        f"--train_manifest={tiny}/{manifest}.json",
        f"--base_ckpt={tiny}/model",
        "--num_workers=0",
        f"--audio_tokenizer={tiny}/codec",
        f"--output_dir={output_dir}",
        "--lora_dropout=0",
        f"--batch_size={batch_size}",
        f"--grad_accum={accumulation}",
        "--max_grad_norm=1e9",
        f"--max_steps={steps}",
        f"--save_steps={steps}",
        "--logging_steps=1",
        *more,
    ]


@pytest.fixture(scope="module")
def steps(tiny, tmp_path_factory):
    """[(split, gradients of the LoRA tensors, metrics)] of the one step that each split takes."""
    folder = tmp_path_factory.mktemp("ranks")
    write_manifests(tiny)
    starts = [
        flags(tiny, manifest, f"{folder}/{manifest}", 1, batch_size, 1, "--lr=1e-2")
        for manifest, batch_size in (("mixed", 8), ("few", 4), ("text", 4))
    ]
    done = launcher.run("tests/support/ranks.py", json.dumps({1: starts}))
    assert done.returncode == 0, done.stderr
    runs = {1: [], 2: [], 4: []}
    for i, (manifest, ranks, batch_size, accumulation, more) in enumerate(SPLITS):
        start = folder / f"start_of_{i}/checkpoint-1"
        shutil.copytree(folder / manifest / "checkpoint-1", start)
        runs[ranks].append(
            flags(
                tiny,
                manifest,
                f"{folder}/{i}",
                2,
                batch_size,
                accumulation,
                *more,
                f"--resume_from_checkpoint={start}",
            )
        )
    done = launcher.run("tests/support/ranks.py", json.dumps(runs))
    assert done.returncode == 0, done.stderr

    def moments(checkpoint):
        state = torch.load(folder / checkpoint / "trainer_state.pt", weights_only=True)["optimizer"]
        return [state[i]["exp_avg"].double() for i in range(len(state))]

    found = []
    for i, split in enumerate(SPLITS):
        before, after = moments(f"{split[0]}/checkpoint-1"), moments(f"{i}/checkpoint-2")
        gradients = [(new - MOMENTUM * old) / (1 - MOMENTUM) for old, new in zip(before, after)]
        lines = (folder / str(i) / "metrics.jsonl").read_text().splitlines()
        found.append((split, gradients, json.loads(lines[-1])))
    return found


def against_first(steps):
    """(split, (gradients, metrics), those of the manifest's first split) of every other split."""
    first = {}
    for split, gradients, metrics in steps:
        yield split, (gradients, metrics), first.setdefault(split[0], (gradients, metrics))


def test_gradients_agree(steps):
    """Catches counts of one rank or one micro-batch in the loss's denominator, a gradient averaged where it
    should be summed, one that is not synchronised, and a sample that an idle rank trains a second time.

    Each of the 40 tensors is a float32 sum over the step's positions, of what comes forward and backward
    through both layers. A split adds them in another order.
    """
    worst, bound = 0.0, rounding_bound(POSITIONS, 2 * TINY["layers"])
    for split, (gradients, _), (expected, _) in against_first(steps):
        for mine, theirs in zip(gradients, expected, strict=True):
            error, norm = (mine - theirs).norm().item(), theirs.norm().item()
            assert error <= bound * norm, f"{split}: {error} of {norm}"
            worst = max(worst, error / norm if norm else 0.0)  # without a clip audio_mlp has no gradient
        assert max(gradient.norm() for gradient in gradients) > 0
    print(f"gradients differ by up to {worst:.1e}")


def test_logged_losses_agree(steps):
    """Catches a logged loss of one rank or one micro-batch, a mean of means, NaN where a step has no clip.

    They are as exact as the logits, which are float32 sums, and add fewer labels than a logit has terms.
    """
    worst, bound = 0.0, rounding_bound(**TINY)
    for split, (_, metrics), (_, expected) in against_first(steps):
        for name in ("loss", "text_loss", "audio_loss", "audio_loss_per_codebook"):
            assert metrics[name] == pytest.approx(expected[name], rel=bound, abs=0), (split, name)
        worst = max(worst, abs(metrics["loss"] / expected["loss"] - 1))
        assert metrics["text_loss"] > 0 and (metrics["audio_loss"] > 0) == (split[0] != "text")
    print(f"losses differ by up to {worst:.1e}")
