"""validate_pipeline.py --adapter: losses, which one is best, what does it sound like."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import lora
import trainer
import validate_pipeline
from dataset import UserError
from tests.acceptance import loss_in_float64
from tests.support.batches import CPU, micro_batches


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
    """Compare in process, with conftest's group of one rank."""
    args = trainer.parse_args(
        [
            f"--train_manifest={manifest}",
            f"--base_ckpt={tiny}/model",
            f"--audio_tokenizer={tiny}/codec",
            f"--output_dir={tiny}/listen",
            "--num_workers=0",
        ]
    )
    validate_pipeline.compare(args, list(adapters), CPU)


def read_losses(told):
    """{name: [text, audio, total, codebooks ...]} of the printed table."""
    rows = [line.split() for line in told.splitlines()]
    is_loss = re.compile(r"-?(\d+\.\d{3}|nan|inf)").fullmatch
    return {
        name: list(map(float, losses))
        for name, *losses in filter(None, rows)
        if losses and all(map(is_loss, losses))
    }


def test_losses_are_the_formulas_and_the_files_are_there(tiny, adapters, open_data, entries, capsys):
    """The rows are the design's formula in float64, of base and adapter; the target's wav has its 30 frames.

    Catches means of means, a base that still has an adapter on, and one that stays on; a page without a
    player, or whose text is taken as HTML.
    """
    near, far = adapters
    spelt = json.loads(json.dumps(entries))
    spelt[0]["messages"][1]["content"][1]["text"] += " <b>&"
    (tiny / "spelt.json").write_text(json.dumps(spelt))
    compare(tiny, tiny / "spelt.json", far, near)
    told = capsys.readouterr().out
    rows = read_losses(told)
    assert list(rows) == ["base", "spread_0.02", "spread_0.5"] and all(
        len(row) == 11 for row in rows.values()
    )
    base = lora.load_base(tiny / "model", torch.float32, "cpu")
    [(batch, _)] = micro_batches(open_data(spelt, "--batch_size=3"), range(3))
    with torch.no_grad():
        assert rows["base"][2] == pytest.approx(loss_in_float64(base(**batch), batch), abs=1.1e-3)
        for name in (near, far):
            model = lora.load_adapter(base, name, "unknown")
            expected = loss_in_float64(model(**batch), batch)
            assert rows[Path(name).name][2] == pytest.approx(expected, abs=1.1e-3)  # printed to 1e-3
            model.unload()
    assert rows["base"][1] == pytest.approx(sum(rows["base"][3:]) / 8, abs=1.1e-3)
    assert rows["base"][2] == pytest.approx(sum(rows["base"][:2]), abs=1.1e-3)
    smallest = min((near, far), key=lambda name: rows[Path(name).name][2])
    assert f"smallest    loss: {smallest};" in told and "warning: under 20 held-out entries" in told
    better = rows["base"][2] < min(rows["spread_0.5"][2], rows["spread_0.02"][2])
    assert ("the base's own loss is smaller" in told) == better
    page = (tiny / "listen/index.html").read_text()
    for entry, frames in enumerate((30, 26, 24)):
        wave, rate = soundfile.read(tiny / f"listen/{entry}-target.wav")
        assert rate == 24_000 and len(wave) == frames * 960
        for name in ("target", "base", "spread_0.5", "spread_0.02"):  # random models: either is fine,
            file = f"{entry}-{name}.wav"  # silence about it is not
            assert (tiny / "listen" / file).exists() == (f'src="{file}"' in page)
            assert (f"entry {entry}: no audio" in told) or (tiny / "listen" / file).exists()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "<script" not in page
    assert f"spread_0.5<br>loss {rows['spread_0.5'][2]:.3f}" in page


def test_an_adapter_may_be_called_as_a_column(tiny, adapters, tmp_path, capsys):
    """Catches one that takes the base's place in the table, or is never heard."""
    for near_or_far, name in zip(adapters, ("base", "target")):
        shutil.copytree(near_or_far, tmp_path / name)
    compare(tiny, tiny / "train.json", str(tmp_path / "base"), str(tmp_path / "target"))
    told = capsys.readouterr().out
    rows = read_losses(told)
    assert list(rows)[0] == "base" and len(rows) == 3
    assert all(name.startswith("adapter-") for name in list(rows)[1:])
    page = (tiny / "listen/index.html").read_text()
    assert 'src="0-reference.wav"' in page and 'src="0-target.wav"' in page


def test_an_adapter_that_is_not_finite_never_wins(tiny, adapters, capsys):
    """Catches NaN, which is neither more nor less than any limit, and would win every comparison."""
    weights = load_file(f"{adapters[1]}/adapter_model.safetensors")
    save_file(
        {name: tensor * (1e30 if "lora_B" in name else 1) for name, tensor in weights.items()},
        f"{adapters[1]}/adapter_model.safetensors",
    )
    with pytest.raises(UserError, match="no adapter has a finite loss"):
        compare(tiny, tiny / "train.json", adapters[1])
    compare(tiny, tiny / "train.json", adapters[1], adapters[0])
    assert f"smallest    loss: {adapters[0]};" in capsys.readouterr().out


def test_fifty_entries_are_enough(tiny, adapters, capsys):
    """And without a clip in them there is nothing to encode, and no target to write."""
    entry = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    (tiny / "sixty.json").write_text(json.dumps(60 * [entry]))
    (tiny / "listen/0-target.wav").unlink(missing_ok=True)
    compare(tiny, tiny / "sixty.json", adapters[0])
    told = capsys.readouterr().out
    assert "of 50 entries" in told and not (tiny / "listen/0-target.wav").exists()
    text, audio, *_ = read_losses(told)["base"]
    assert np.isfinite(text) and audio == 0  # no audio label: no audio loss


def test_what_is_wrong_is_said_by_its_flag(tiny, tmp_path):
    with pytest.raises(UserError, match="--adapter .*none: no such folder"):
        compare(tiny, tiny / "train.json", f"{tmp_path}/none")
