"""What --output_dir holds: claimed, whole or absent, refused where it is damaged or another run's."""

import json
import math
import os
import re
import resource
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from dataset import UserError
from tests.support import launcher
from tests.test_training import run

SETTINGS = dict(base_fingerprint="b", manifest_fingerprint="m", lora_r=4, lora_alpha=8, seed=1)


def flags(output_dir):
    return SimpleNamespace(output_dir=output_dir, lr=0.1)


@pytest.fixture
def optimizer(lora_model):
    """AdamW after one step on the tiny adapter."""
    optimizer = torch.optim.AdamW([p for p in lora_model.parameters() if p.requires_grad], lr=0.1)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path, lora_model, optimizer):
    (tmp_path / "unfinished").mkdir()  # as a killed run leaves it
    lora.save_checkpoint(lora_model, optimizer, SETTINGS, flags(tmp_path), step=5)
    return tmp_path / "checkpoint-5"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "checkpoint-5/trainer_state.pt"])
def test_results_are_not_trained_over(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds a run: use another folder, or --resume_from_checkpoint auto"):
        lora.open_output(tmp_path, None)


def test_auto_takes_the_newest_and_paths_only_into_a_folder_that_is_not_ahead(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "other/checkpoint-40"
    assert lora.open_output(out, "auto") is None  # so that --max_restarts works with the very same command
    for step in (5, 100, 20):
        (out / f"checkpoint-{step}").mkdir()
    (out / "unfinished").mkdir()
    for folder in (out / "checkpoint-20", out / "checkpoint-100", elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer_state.pt").touch()
    for wanted in ("auto", f"{out}/checkpoint-100"):
        assert lora.open_output(out, wanted) == out / "checkpoint-100"
    for behind in (f"{out}/checkpoint-20", f"{elsewhere}"):
        with pytest.raises(UserError, match="holds a run"):
            lora.open_output(out, behind)
    assert lora.open_output(tmp_path / "new", f"{elsewhere}") == elsewhere
    (out / "checkpoint-100/trainer_state.pt").unlink()  # to save room: what is left must not stop a save
    (out / "checkpoint-100/adapter_model.safetensors").touch()
    (out / "checkpoint-20/trainer_state.pt").unlink()
    for wanted in ("auto", None):
        with pytest.raises(UserError, match="holds a run"):
            lora.open_output(out, wanted)  # checkpoint-9/adapter
    shutil.rmtree(out)
    out.mkdir()
    (out / "adapter_model.safetensors").touch()  # an adapter, but no checkpoint to go on from
    with pytest.raises(UserError, match="holds a run"):
        lora.open_output(out, "auto")


def test_a_path_that_is_no_checkpoint_is_told(tmp_path):
    """Catches "damaged, remove it" of a run's own folder: obeying would delete the run."""
    (tmp_path / "out/checkpoint-20").mkdir(parents=True)
    (tmp_path / "out/checkpoint-20/trainer_state.pt").touch()
    (tmp_path / "out/checkpoint-99").mkdir()  # as a copy that was interrupted leaves it
    for wanted in (tmp_path / "out", tmp_path / "out/checkpoint-2"):
        with pytest.raises(UserError, match=f"{wanted} is no checkpoint; the newest is .*checkpoint-20"):
            lora.open_output(tmp_path / "out", str(wanted))


def test_an_older_checkpoint_that_is_a_link_does_not_stop_the_save(saved, lora_model, optimizer):
    (saved.parent / "checkpoint-3").symlink_to(saved)
    lora.save_checkpoint(lora_model, optimizer, SETTINGS, flags(saved.parent), step=6)
    assert (saved.parent / "checkpoint-3").is_symlink() and (saved.parent / "checkpoint-6").exists()


def test_a_folder_that_cannot_be_written():
    folder = "/dev/null/out"
    with pytest.raises(UserError, match=f"--output_dir {folder} cannot be written"):
        lora.open_output(Path(folder), None)


def test_a_checkpoint_comes_back_whole(saved, lora_model, optimizer):
    state = lora.read_checkpoint(saved, SETTINGS)
    assert state["step"] == 5
    assert json.loads((saved / "args.json").read_text())["lr"] == 0.1
    for name, value in lora_model.state_dict().items():
        assert "lora_" not in name or torch.equal(state["adapter"][name.replace(".default", "")], value)
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state["optimizer"][i][name], value) for name, value in moments.items())


class Code:
    """Calls exit where a pickle that has it is loaded."""

    def __reduce__(self):
        return exit, ("loaded",)


DAMAGES = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("foreign"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "another trainer's": lambda file: torch.save({"step": 5}, file),
    "a list": lambda file: torch.save([1], file),
    "code": lambda file: torch.save({"settings": Code()}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(saved, damage):
    for name in ("adapter_model.safetensors", "trainer_state.pt"):
        folder = shutil.copytree(saved, saved.parent / name / saved.name)
        DAMAGES[damage](folder / name)
        with pytest.raises(UserError, match="checkpoint-5 cannot be read"):
            lora.read_checkpoint(folder, SETTINGS)


@pytest.mark.parametrize("content", [Code(), [1], {"settings": [1]}, torch.ones(2)])
def test_another_trainers_checkpoint_is_refused(saved, content):
    torch.save(content, saved / "trainer_state.pt")
    with pytest.raises(UserError, match="checkpoint-5 cannot be read"):
        lora.read_checkpoint(saved, SETTINGS)


@pytest.mark.parametrize("key", list(SETTINGS))
def test_a_run_that_differs_is_refused(saved, key):
    told = f"another run, or of another file: choose another.*\n  {key}: was {SETTINGS[key]}, is other$"
    with pytest.raises(UserError, match=told):
        lora.read_checkpoint(saved, SETTINGS | {key: "other"})


def test_what_does_not_fit_leaves_the_others_whole(saved, lora_model, optimizer):
    """A file-size limit stands for a full disk or a quota: the same OSError in the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1000, 100_000, 400_000):  # in adapter_config.json, the adapter, the optimizer's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot be written; if the disk is full, make room"):
                lora.save_checkpoint(lora_model, optimizer, SETTINGS, flags(saved.parent), step=6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert lora.list_checkpoints(saved.parent) == [saved] and lora.read_checkpoint(saved, SETTINGS)
    lora.save_checkpoint(lora_model, optimizer, SETTINGS, flags(saved.parent), step=6)
    assert [folder.name for folder in lora.list_checkpoints(saved.parent)] == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize("logging_steps, steps", [(2, 40), (10, 4)], ids=["on the way", "at the end"])
def test_a_run_without_finite_steps_stops(tiny, tmp_path, logging_steps, steps):
    """After a step at such a rate nothing is finite any more: ten steps (all of a run that is shorter) are
    skipped. metrics.jsonl stays JSON, and there is no adapter.
    """
    flags = [
        "--train_manifest",
        tiny / "train.json",
        "--base_ckpt",
        tiny / "model",
        "--lr",
        "1e30",
        "--audio_tokenizer",
        tiny / "codec",
        "--output_dir",
        tmp_path,
        "--batch_size",
        1,
        "--grad_accum",
        2,
        "--warmup_ratio",
        0,
        "--max_steps",
        steps,
        "--logging_steps",
        logging_steps,
        "--num_workers",
        0,
    ]
    if steps < logging_steps:  # else its first step is finite
        shutil.copytree(tiny / "model", tmp_path / "broken")
        weights = load_file(tmp_path / "broken/model.safetensors")
        weights["norm.weight"][0] = torch.nan
        save_file(weights, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
        flags[3] = tmp_path / "broken"
    done = launcher.run("trainer.py", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(
        r"error: no finite gradient after step \d: lower --lr; see entries \[\d, \d\]", done.stderr
    )
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Its first step is finite, then ten are not; or all of a short run
    assert metrics[-1]["step"] == (10 if steps == 40 else 4) and metrics[-1]["loss"] is None
    assert metrics[-1]["skipped_steps"] == (9 if steps == 40 else 4)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_files_are_as_readable_as_the_umask_says(saved):
    """Catches safetensors' 0600, with which another user's server cannot read the adapter."""
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert set(modes.values()) == {0o666 & ~umask}


def test_a_disk_without_modes_and_fsync_of_folders_is_enough(saved, lora_model, optimizer, monkeypatch):
    """As mounted buckets and some shares are."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("no fsync of folders")
        fsync(descriptor)

    def refuse(*_, **__):
        raise PermissionError("no modes")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    monkeypatch.setattr(os, "chmod", refuse)
    lora.save_checkpoint(lora_model, optimizer, SETTINGS, flags(saved.parent), step=6)
    assert lora.read_checkpoint(saved.parent / "checkpoint-6", SETTINGS)["step"] == 6


def test_learning_rate_and_length_are_the_command_lines_on_resume(tiny, tmp_path):
    """Catches a schedule that comes from the checkpoint: the rate asked for would be ignored in silence."""
    flags = [
        "--train_manifest",
        tiny / "train.json",
        "--batch_size",
        1,
        "--grad_accum",
        1,
        "--warmup_ratio",
        0,
        "--resume_from_checkpoint",
        "auto",
    ]
    run(tiny, tmp_path, *flags, "--max_steps", 2, "--lr", "1e-3")
    metrics = run(tiny, tmp_path, *flags, "--max_steps", 4, "--lr", "5e-4")
    cosine = [
        0.5 * (1 + math.cos(math.pi * step / total))
        for step, total in ((0, 2), (1, 2), (2, 4), (3, 4))  # the rate that the step took
    ]
    expected = [1e-3 * cosine[0], 1e-3 * cosine[1], 5e-4 * cosine[2], 5e-4 * cosine[3]]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    rounding = 10 * 1e-3 * torch.finfo(torch.float64).eps  # Python's floats
    assert [line["lr"] for line in metrics] == pytest.approx(expected, abs=rounding)
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert adapter == (tmp_path / "checkpoint-4/adapter_model.safetensors").read_bytes()
    (tmp_path / "checkpoint-4/adapter_model.safetensors").write_bytes(adapter[:1000])  # started again, it is
    with pytest.raises(
        AssertionError, match="checkpoint-4 cannot be read"
    ):  # not put in the good one's place
        run(tiny, tmp_path, *flags, "--max_steps", 4)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter
