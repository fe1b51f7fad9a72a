"""Controls of the acceptance row "It learns what inference runs": two trainings that must fail it, at as
small a loss as that of the right one, which passes.
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
AS_IT_IS = "import sys, trainer; trainer.main(trainer.parse_args(sys.argv[1:])); trainer.leave(0)"


@pytest.fixture(scope="module")
def lab(tiny):
    return acceptance.open_lab(tiny)


@pytest.mark.parametrize("name, program, flags", [
    ("right", AS_IT_IS, []), ("unshifted", UNSHIFTED, []),
    ("deaf", AS_IT_IS, ["--return_audio_in_tokens", "false"])], ids=["right", "unshifted", "deaf"])
def test_only_the_right_training_speaks(tiny, lab, name, program, flags):
    """The row passes for the right training and fails for both controls; so it can tell them apart."""
    done = launcher.run(
        "-c", program, *acceptance.OVERFIT, "--batch_size", 4, "--train_manifest",
        tiny / "train.json", "--base_ckpt", tiny / "model", "--audio_tokenizer", tiny / "codec",
        "--output_dir", tiny / name, *flags)
    assert done.returncode == 0, done.stderr
    final = json.loads((tiny / name / "metrics.jsonl").read_text().splitlines()[-1])
    passed, figure = acceptance.check_learned(lab, name)
    print(f"{name}: loss {final['loss']:.4f}, {figure}")
    assert final["loss"] < 0.05 and passed == (name == "right")
