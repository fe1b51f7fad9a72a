"""validate_pipeline.py --adapter: is it heard, which one is best, what does it sound like."""

import json
import sys

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
    """Folders of adapters whose B has this much spread; the last one changes nothing."""
    folders = []
    for spread in (0.02, 0.5, 0.0):
        for name, parameter in lora_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=spread)
        folders.append(str(tmp_path / f"spread_{spread}"))
        lora_model.save_pretrained(folders[-1], save_embedding_layers=False)
    return folders


def compare(tiny, manifest, *adapters, flags=()):
    args = trainer.parse_args([f"--train_manifest={manifest}", f"--base_ckpt={tiny}/model", *flags,
                               f"--audio_tokenizer={tiny}/codec", f"--output_dir={tiny}/listen"])
    validate_pipeline.compare(args, torch.distributed.HashStore(), CPU, adapters)


def test_losses_are_the_formulas_and_the_files_are_there(tiny, adapters, open_data, entries, capsys):
    """The base's row is the design's formula in float64; merged says what the adapter says; the target's wav
    has its 30 frames. Catches means of means, a base that still has an adapter on, and one that stays on.
    """
    near, far, _ = adapters
    compare(tiny, tiny / "train.json", far, near)
    told = capsys.readouterr().out.splitlines()
    rows = {line.split()[-1]: [float(word) for word in line.split()[:-1]] for line in told if line[0] == " "}
    assert list(rows) == ["(base)", far, near, "(merged)"] and all(len(row) == 10 for row in rows.values())
    base = lora.load_base(tiny / "model", torch.float32, "cpu")
    [(batch, _)] = open_data(entries, "--batch_size=3")[range(3), True]
    with torch.no_grad():
        assert sum(rows["(base)"][:2]) == pytest.approx(loss_in_float64(base(**batch), batch), abs=1.1e-3)
        expected = loss_in_float64(lora.load_adapter(base, near)(**batch), batch)
    assert sum(rows[near][:2]) == pytest.approx(expected, abs=1.1e-3)  # they are printed to 1e-3
    assert rows["(merged)"] == pytest.approx(rows[near], abs=1.1e-3)
    assert rows["(base)"][1] == pytest.approx(sum(rows["(base)"][2:]) / 8, abs=1.1e-3)
    best = min((near, far), key=lambda name: sum(rows[name][:2]))
    assert f"best        {best}, by text and audio loss" in told
    wave, rate = soundfile.read(tiny / "listen/target.wav")
    assert rate == 24_000 and len(wave) == 30 * 960
    for name in ("base", "adapter"):  # random models: either is fine, silence about it is not
        [line] = [line for line in told if line.startswith(f"{name} ")]
        assert (tiny / f"listen/{name}.wav").exists() == ("emits no audio" not in line)


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_an_adapter_that_does_nothing_or_no_good_is_told(tiny, adapters, factor, capsys):
    """Catches NaN, which is neither more nor less than any limit, and would win every comparison."""
    weights = load_file(f"{adapters[1]}/adapter_model.safetensors")
    save_file({name: tensor * (factor if "lora_B" in name else 1) for name, tensor in weights.items()},
              f"{adapters[1]}/adapter_model.safetensors")
    with pytest.raises(PipelineError, match="spread_0.5 changes the logits by "):
        compare(tiny, "", adapters[0], adapters[1])
    assert f"best        {adapters[0]}" in capsys.readouterr().out or not factor


@pytest.mark.parametrize("precision, factor", [("fp32", 1.01), ("bf16", 0.0)])
def test_a_merge_that_computes_something_else_is_told(tiny, adapters, monkeypatch, capsys, precision, factor):
    """Planted: what is merged has 1% more of B; in bfloat16, whose rounding is of that size, nothing of a
    weak B. Without a manifest: a sentence, no codec, no wav file.
    """
    flags = ["--audio_tokenizer=none", f"--precision={precision}"]
    compare(tiny, "", adapters[0], flags=flags)
    assert "of 1 entries" in capsys.readouterr().out
    load, loaded = lora.load_adapter, []

    def planted(base, name):
        loaded.append(load(base, name))
        for key, parameter in loaded[-1].named_parameters():
            parameter.data *= factor if "lora_B" in key and len(loaded) > 1 else 1
        return loaded[-1]

    monkeypatch.setattr(lora, "load_adapter", planted)
    with pytest.raises(PipelineError, match="merged, .*spread_0.02 is another"):
        compare(tiny, "", adapters[0], flags=flags)


def test_fifty_entries_are_enough(tiny, adapters, capsys):
    entry = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    (tiny / "sixty.json").write_text(json.dumps(60 * [entry]))
    compare(tiny, tiny / "sixty.json", adapters[0])
    assert "of 50 entries" in capsys.readouterr().out


def test_what_is_wrong_is_said_without_a_traceback(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "join_ranks", lambda: (torch.distributed.HashStore(), CPU, 0, 1))
    for options, message in ((["--base_ckpt", f"{tiny}/model"], "--adapter .*none: no LoRA adapter there"),
                             ([], "--base_ckpt bosonai/.*: no Higgs Audio checkpoint there")):
        monkeypatch.setattr(sys, "argv", ["validate", *options, "--adapter", f"{tmp_path}/none"])
        with pytest.raises(SystemExit, match=f"to fix first:\n{message}"):
            validate_pipeline.main()
    monkeypatch.setattr(sys, "argv", ["validate", "--base_ckpt", f"{tiny}/model"])
    with pytest.raises(SystemExit, match="2"):  # argparse's: --train_manifest is required
        validate_pipeline.main()
