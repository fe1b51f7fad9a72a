"""validate_pipeline.py --adapter: losses, which one is best, what does it sound like."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import lora
import trainer
import validate_pipeline
from dataset import PipelineError
from tests.acceptance import loss_in_float64

CPU = torch.device("cpu")


@pytest.fixture
def adapters(tmp_path, lora_model):
    """Folders of two adapters whose B has this much spread."""
    folders = []
    for spread in (0.02, 0.5):
        for name, parameter in lora_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=spread)
        folders.append(str(tmp_path / f"spread_{spread}"))
        lora_model.save_pretrained(folders[-1], save_embedding_layers=False)
    return folders


def compare(tiny, manifest, *adapters):
    """Compare in process; torchrun's group is conftest's."""
    args = trainer.parse_args(
        [
            f"--train_manifest={manifest}",
            f"--base_ckpt={tiny}/model",
            f"--audio_tokenizer={tiny}/codec",
            f"--output_dir={tiny}/listen",
        ]
    )
    args.adapter = adapters
    validate_pipeline.compare(args, CPU)


def test_losses_are_the_formulas_and_the_files_are_there(tiny, adapters, open_data, entries, capsys):
    """The rows are the design's formula in float64, of base and adapter; the target's wav has its 30 frames.

    Catches means of means, a base that still has an adapter on, and one that stays on.
    """
    near, far = adapters
    compare(tiny, tiny / "train.json", far, near)
    told = capsys.readouterr().out.splitlines()
    rows = {line.split()[-1]: [float(word) for word in line.split()[:-1]] for line in told if line[0] == " "}
    assert list(rows) == ["(base)", far, near] and all(len(row) == 10 for row in rows.values())
    base = lora.load_base(tiny / "model", torch.float32, "cpu")
    [(batch, _)] = open_data(entries, "--batch_size=3")[range(3), True]
    with torch.no_grad():
        assert sum(rows["(base)"][:2]) == pytest.approx(loss_in_float64(base(**batch), batch), abs=1.1e-3)
        for name in (near, far):
            model = lora.load_adapter(base, name)
            expected = loss_in_float64(model(**batch), batch)
            assert sum(rows[name][:2]) == pytest.approx(expected, abs=1.1e-3)  # printed to 1e-3
            model.unload()
    assert rows["(base)"][1] == pytest.approx(sum(rows["(base)"][2:]) / 8, abs=1.1e-3)
    best = min((near, far), key=lambda name: sum(rows[name][:2]))
    assert f"best        {best}, by text and audio loss" in told
    wave, rate = soundfile.read(tiny / "listen/target.wav")
    assert rate == 24_000 and len(wave) == 30 * 960
    for name in ("base", "adapter"):  # random models: either is fine, silence about it is not
        [line] = [line for line in told if line.startswith(f"{name} ")]
        assert (tiny / f"listen/{name}.wav").exists() == ("emits no audio" not in line)


def test_an_adapter_that_is_not_finite_never_wins(tiny, adapters, capsys):
    """Catches NaN, which is neither more nor less than any limit, and would win every comparison."""
    weights = load_file(f"{adapters[1]}/adapter_model.safetensors")
    save_file(
        {name: tensor * (1e30 if "lora_B" in name else 1) for name, tensor in weights.items()},
        f"{adapters[1]}/adapter_model.safetensors",
    )
    with pytest.raises(PipelineError, match="no adapter has a finite loss"):
        compare(tiny, tiny / "train.json", adapters[1])
    compare(tiny, tiny / "train.json", adapters[1], adapters[0])
    assert f"best        {adapters[0]}" in capsys.readouterr().out


def test_fifty_entries_are_enough(tiny, adapters, capsys):
    """And without a clip in them there is nothing to encode, and no target to write."""
    entry = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    (tiny / "sixty.json").write_text(json.dumps(60 * [entry]))
    (tiny / "listen/target.wav").unlink(missing_ok=True)
    compare(tiny, tiny / "sixty.json", adapters[0])
    told = capsys.readouterr().out
    assert "of 50 entries" in told and not (tiny / "listen/target.wav").exists()
    [row] = [line.split() for line in told.splitlines() if line.endswith("(base)")]
    assert np.isfinite(float(row[0])) and float(row[1]) == 0  # no audio label: no audio loss


def test_what_is_wrong_is_said_by_its_flag(tiny, tmp_path):
    with pytest.raises(PipelineError, match="--adapter .*none: no such folder"):
        compare(tiny, tiny / "train.json", f"{tmp_path}/none")
