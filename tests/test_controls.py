"""Controls of the acceptance row "It learns what inference runs": two trainings that fail it, at as small a
loss as that of the right one, which passes (in test_readme.py).
"""

import json
import math

import pytest

from tests import acceptance
from tests.support import launcher

LEARNED = math.log(2)  # a loss at which a target is as likely as all else; before the training it is over 20

# Every label one position later: the trainer's shift then compares logits and labels at the same position,
# and that is the loss of known trainers for this model.
UNSHIFTED = """
import lora, trainer
base_forward, loss_forward = lora.HiggsAudioModel.forward, trainer.LossModel.forward
def unshifted_text(self, *args, **kwargs):
    outputs = base_forward(self, *args, **kwargs)
    outputs.expanded_labels = outputs.expanded_labels.roll(1, dims=1)
    return outputs
def unshifted_audio(self, batch):
    return loss_forward(self, batch | {"label_audio_ids": batch["label_audio_ids"].roll(1, dims=1)})
lora.HiggsAudioModel.forward, trainer.LossModel.forward = unshifted_text, unshifted_audio
trainer.run_and_exit(trainer.train, trainer.parse_args())
"""


DEAF = """
import dataset, trainer
build_collator = dataset.build_collator
def build_deaf_collator(entries, config):
    collator = build_collator(entries, config)
    collator.return_audio_in_tokens = False
    return collator
dataset.build_collator = build_deaf_collator
trainer.run_and_exit(trainer.train, trainer.parse_args())
"""


@pytest.fixture(scope="module")
def lab(tiny):
    return acceptance.open_lab(tiny)


def train_and_listen(tiny, lab, name, *program):
    """Train by this program: (its last loss, each entry's share of codes that are the target's, whether
    the row passes).
    """
    done = launcher.run(
        *program,
        *acceptance.OVERFIT,
        "--batch_size=3",
        f"--train_manifest={tiny}/train.json",
        f"--base_ckpt={tiny}/model",
        f"--audio_tokenizer={tiny}/codec",
        f"--output_dir={tiny}/{name}",
    )
    assert done.returncode == 0, done.stderr
    loss = json.loads((tiny / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    accuracies, stops = acceptance.answer_all(lab, name)
    passed, figure = acceptance.judge(accuracies, stops)
    print(f"{name}: loss {loss:.4f}, {figure}")
    return loss, accuracies, passed


def test_unshifted_training_speaks_no_target(tiny, lab):
    loss, accuracies, passed = train_and_listen(tiny, lab, "unshifted", "-c", UNSHIFTED)
    assert loss < LEARNED and not passed and max(accuracies) < 0.5


def test_deaf_training_speaks_the_targets_that_need_no_reference(tiny, lab, monkeypatch):
    """Asked as it was trained, without the references' codes, as is upstream's default. Two prompts are then
    one and get one answer: one target of theirs is spoken, the other not, whatever the numbers drawn.
    """
    monkeypatch.setattr(lab.engine.collator, "return_audio_in_tokens", False)
    loss, accuracies, passed = train_and_listen(tiny, lab, "deaf", "-c", DEAF)
    assert loss < LEARNED and not passed
    assert min(accuracies[:2]) < 0.5 and max(accuracies[:2]) > 0.9 and accuracies[2] > 0.9
