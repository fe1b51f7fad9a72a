"""validate_pipeline.py --adapter: losses, which one is best, what does it sound like."""

import json
import re
import shutil
from datetime import date
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
from tests.support.bounds import TINY, rounding_bound


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


def compare(tiny, manifest, *adapters, output="listen"):
    """Compare in process, with conftest's group of one rank."""
    args = trainer.parse_args(
        [
            f"--train_manifest={manifest}",
            f"--base_ckpt={tiny}/model",
            f"--audio_tokenizer={tiny}/codec",
            f"--output_dir={tiny}/{output}",
            "--num_workers=0",
        ]
    )
    args.adapter = list(map(str, adapters))
    validate_pipeline.compare(args, CPU)


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
    assert list(rows) == ["base", "spread_0.5", "spread_0.02"] and all(
        len(row) == 11 for row in rows.values()
    )
    base = lora.load_base(tiny / "model", torch.float32, "cpu")
    [(batch, _)] = micro_batches(open_data(spelt), range(3))
    with torch.no_grad():
        expected = loss_in_float64(base(**batch), batch)
        bound = 5e-4 + rounding_bound(**TINY, scale=expected)  # printed to 1e-3
        assert rows["base"][2] == pytest.approx(expected, abs=bound)
        for name in (near, far):
            model, _ = lora.load_adapter(base, name, "unknown")
            expected = loss_in_float64(model(**batch), batch)
            bound = 5e-4 + rounding_bound(**TINY, scale=expected)
            assert rows[Path(name).name][2] == pytest.approx(expected, abs=bound)
            model.unload()
    # Of numbers that are each printed to 1e-3
    assert rows["base"][1] == pytest.approx(sum(rows["base"][3:]) / 8, abs=1.1e-3)
    assert rows["base"][2] == pytest.approx(sum(rows["base"][:2]), abs=1.1e-3)
    names = {"base": "base", "spread_0.02": near, "spread_0.5": far}
    smallest = min(names, key=lambda name: rows[name][2])
    assert f"smallest    loss: {names[smallest]};" in told and "warning: under 20 held-out entries" in told
    assert "these entries were trained" not in told  # these adapters do not say what they were trained on
    page = (tiny / "listen/index.html").read_text()
    for entry, frames in enumerate((30, 26, 24)):
        wave, rate = soundfile.read(tiny / f"listen/{entry}-target.wav")
        assert rate == 24_000 and len(wave) == frames * 960
        for name in ("target", "base", "spread_0.5", "spread_0.02"):  # random models: either is fine,
            file = f"{entry}-{name}.wav"  # silence about it is not
            assert (tiny / "listen" / file).exists() == (f'src="{file}"' in page)
            told_of_it = f"{name:<11} entry {entry}: no audio: the model made no sound"
            assert (told_of_it in told) or (tiny / "listen" / file).exists()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "<script" not in page
    assert f"spread_0.5<br>loss {rows['spread_0.5'][2]:.3f}" in page
    assert (
        page.count("the smallest") == 1
        and f"{smallest}<br>loss {rows[smallest][2]:.3f}, the smallest" in page
    )
    assert re.findall("<th>(\\w+)", page) == ["text", "target", "reference", "base", "spread_0", "spread_0"]
    assert '<audio controls src="0-target.wav"></audio> 1.2 s</td>' in page and "Error" not in page
    assert f"<title>{tiny}/spelt.json, {date.today()}</title>" in page
    assert f"adapters: {far}, {near}\n" in page and "warning: under 20 held-out entries" in page
    assert page.count('<div dir="auto">') == 3 and "position: sticky" in page


def test_entries_that_an_adapter_was_trained_on(tiny, adapters, capsys):
    """Their losses are told to say nothing, on the page as well."""
    args = {"manifest_fingerprint": lora.fingerprint([tiny / "train.json"])}
    Path(adapters[1], "args.json").write_text(json.dumps(args))
    compare(tiny, tiny / "train.json", *adapters)
    warning = "warning: these entries were trained, so the losses tell nothing: give held-out entries"
    assert warning in capsys.readouterr().out and warning in (tiny / "listen/index.html").read_text()


def test_an_interrupted_comparison_leaves_no_former_page(tiny, adapters, monkeypatch):
    """Nor sounds of the same names; but what else is in the folder stays."""
    (tiny / "interrupted").mkdir()
    for name in ("index.html", "0-target.wav", "2-spread_0.02.wav", "0-mine.wav"):
        (tiny / "interrupted" / name).write_text("former")

    def be_interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(validate_pipeline, "write_audio", be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny, tiny / "train.json", adapters[0], output="interrupted")
    assert [path.name for path in (tiny / "interrupted").iterdir()] == ["0-mine.wav"]


def test_checkpoints_come_by_their_steps_and_names_are_escaped(tiny, adapters, tmp_path, capsys):
    """A shell completes folders with a slash, and sorts them as words; a name may be no HTML and no URL."""
    names = ["checkpoint-100", "checkpoint-20", "a&<b> #1"]
    for name in names:
        shutil.copytree(adapters[0], tmp_path / name)
        (tmp_path / name / "args.json").write_text('{"manifest_fingerprint": "of another"}')
    shutil.copy(tiny / "train.json", tiny / "<i>&.json")
    compare(tiny, tiny / "<i>&.json", *(f"{tmp_path}/{name}/" for name in names))
    told = capsys.readouterr().out
    steps = re.findall(r"(?m)^(base|checkpoint-\d+|a&<b> #1) +\d+\.\d{3}", told)
    assert steps == ["base", "a&<b> #1", "checkpoint-20", "checkpoint-100"]
    page = (tiny / "listen/index.html").read_text()
    assert "<b>" not in page and "<i>" not in page and "entries were trained" not in told
    assert "<th>a&amp;&lt;b&gt; #1<br>" in page and "/&lt;i&gt;&amp;.json, 2" in page
    for entry in range(3):
        if (tiny / f"listen/{entry}-a&<b> #1.wav").exists():
            assert f'src="{entry}-a%26%3Cb%3E%20%231.wav"' in page


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
    told = capsys.readouterr().out
    assert "spread_0.5  entry 0: no audio: the model made no sound\n" in told  # it raises RuntimeError
    assert f"smallest    loss: {adapters[0]};" in told or "smallest    loss: base;" in told


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
    with pytest.raises(UserError, match="--adapter .*none: no LoRA adapter there"):
        compare(tiny, tiny / "train.json", f"{tmp_path}/none")
