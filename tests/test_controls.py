"""Controls of the acceptance row "It learns what inference runs": two trainings that must fail it, at as
small a loss as that of the right one, which passes (test_readme.py runs it).
"""

import json

import pytest

from tests import acceptance, launcher

# Every label one position later: the trainer's shift then compares logits and labels at the same position,
# and that is the loss of known trainers for this model.
UNSHIFTED = """
import sys, torch, trainer
shifted = trainer.loss_sums
def unshifted(outputs, batch, counts, text_head):
    outputs.expanded_labels = outputs.expanded_labels.roll(1, dims=1)
    batch = batch | {"label_audio_ids": batch["label_audio_ids"].roll(1, dims=1)}
    return shifted(outputs, batch, counts, text_head)
trainer.loss_sums = unshifted
trainer.main(trainer.parse_args(sys.argv[1:]))
trainer.leave(0)
"""


@pytest.fixture(scope="module")
def lab(tiny):
    return acceptance.open_lab(tiny)


def speaks(tiny, lab, name, *program):
    """Train by this program: (its last loss, whether the row passes)."""
    done = launcher.run(
        *program, *acceptance.OVERFIT, "--batch_size=4", f"--train_manifest={tiny}/train.json",
        f"--base_ckpt={tiny}/model", f"--audio_tokenizer={tiny}/codec", f"--output_dir={tiny}/{name}")
    assert done.returncode == 0, done.stderr
    loss = json.loads((tiny / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    passed, figure = acceptance.check_learned(lab, name)
    print(f"{name}: loss {loss:.4f}, {figure}")
    return loss, passed


def test_unshifted_training_does_not_speak(tiny, lab):
    loss, passed = speaks(tiny, lab, "unshifted", "-c", UNSHIFTED)
    assert loss < 0.05 and not passed


def test_deaf_training_does_not_speak(tiny, lab, monkeypatch):
    """Nor is the engine given the references, as is upstream's default: two of the prompts are then one, and
    it is certain, whatever the numbers drawn, that one of the two answers is wrong.
    """
    monkeypatch.setattr(lab.engine.collator, "return_audio_in_tokens", False)
    loss, passed = speaks(tiny, lab, "deaf", "trainer.py", "--return_audio_in_tokens=false")
    assert loss < 0.05 and not passed
