"""What --output_dir holds: claimed, whole or absent, refused where it is damaged or another run's."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread

import lora
import output
import trainer
from dataset import PipelineError
from tests.test_training import ROOT, run

RUN = dict(base_ckpt="b", train_manifest="m", lora_r=4, lora_alpha=8, seed=1, samples_per_step=16)
CARD = {"base": "`b`"}, "python trainer.py", "some/base"
HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


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
    output.save_checkpoint(tmp_path, lora_model, optimizer, RUN, CARD, keep=2, step=5)
    return tmp_path / "checkpoint-5"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "checkpoint-5/trainer_state.pt"])
def test_results_are_not_trained_over(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(PipelineError, match="already holds an adapter or checkpoints; choose"):
        output.open_output(tmp_path, None)


def test_auto_takes_the_newest_and_paths_only_into_a_folder_that_is_not_ahead(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "other/checkpoint-40"
    assert output.open_output(out, "auto") is None  # so that --max_restarts works with the very same command
    for step in (5, 100, 20):
        (out / f"checkpoint-{step}").mkdir()
    (out / "unfinished").mkdir()
    for wanted in ("auto", f"{out}/checkpoint-100"):
        assert output.open_output(out, wanted) == out / "checkpoint-100"
    for behind in (f"{out}/checkpoint-20", f"{elsewhere}"):
        with pytest.raises(PipelineError, match="already holds an adapter or checkpoints"):
            output.open_output(out, behind)
    assert output.open_output(tmp_path / "new", f"{elsewhere}") == elsewhere
    shutil.rmtree(out)
    out.mkdir()
    (out / "adapter_model.safetensors").touch()  # an adapter, but no checkpoint to go on from
    with pytest.raises(PipelineError, match="already holds an adapter"):
        output.open_output(out, "auto")


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(PipelineError, match="another run is training into it"):
        output.open_output(tmp_path, "auto")
    other.kill()  # however it ends, the lock is free
    other.wait()
    assert output.open_output(tmp_path, "auto") is None


@pytest.mark.parametrize("folder", ["/dev/null/out", "/proc/self"])
def test_a_folder_that_cannot_be_written(folder):
    with pytest.raises(PipelineError, match=f"--output_dir {folder} cannot be written"):
        output.open_output(Path(folder), None)


def test_a_checkpoint_comes_back_whole(saved, lora_model, optimizer):
    state = output.read_checkpoint(saved, RUN)
    assert state["step"] == 5
    for name, value in lora_model.state_dict().items():
        assert "lora_" not in name or torch.equal(state["adapter"][name.replace(".default", "")], value)
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state["optimizer"][i][name], value) for name, value in moments.items())


def flip(file):
    """One bit in the middle, in a tensor's data: torch.load itself would not see it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Code:
    """Calls exit where a pickle that has it is loaded."""

    def __reduce__(self):
        return exit, ("loaded",)


DAMAGES = {
    "a bit": flip, "gone": lambda file: file.unlink(), "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("foreign"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "another trainer's": lambda file: torch.save({"step": 5}, file),
    "a list": lambda file: torch.save([1], file), "code": lambda file: torch.save({"run": Code()}, file)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(saved, damage):
    for name in ("checksum", *output.CHECKPOINT):
        folder = shutil.copytree(saved, saved.parent / name / saved.name)
        DAMAGES[damage](folder / name)
        with pytest.raises(PipelineError, match="checkpoint-5 is damaged, or no checkpoint of this trainer"):
            output.read_checkpoint(folder, RUN)


@pytest.mark.parametrize("content", [Code(), [1], {"run": [1]}, {"run": RUN, "step": 5}, torch.ones(2)])
def test_another_trainers_checkpoint_is_refused_even_with_our_checksum(saved, content):
    torch.save(content, saved / "trainer_state.pt")
    (saved / "checksum").write_text(lora.fingerprint(saved / name for name in output.CHECKPOINT))
    with pytest.raises(PipelineError, match="checkpoint-5 is damaged, or no checkpoint of this trainer"):
        output.read_checkpoint(saved, RUN)


@pytest.mark.parametrize("key", list(RUN))
def test_a_run_that_differs_is_refused(saved, key):
    with pytest.raises(PipelineError, match=f"belongs to another run: {key} was {RUN[key]}, is other$"):
        output.read_checkpoint(saved, RUN | {key: "other"})


def test_what_does_not_fit_leaves_the_others_whole(saved, lora_model, optimizer):
    """A file-size limit stands for a full disk or a quota: the same OSError in the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1000, 100_000, 400_000):  # in adapter_config.json, the adapter, the optimizer's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(PipelineError, match="checkpoint-6 cannot be written; those before it are"):
                output.save_checkpoint(saved.parent, lora_model, optimizer, RUN, CARD, keep=1, step=6)
            with pytest.raises(PipelineError, match="cannot be copied") if size < 4e5 else nullcontext():
                output.publish(saved, saved.parent)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert output.checkpoints(saved.parent) == [saved] and output.read_checkpoint(saved, RUN)
    output.save_checkpoint(saved.parent, lora_model, optimizer, RUN, CARD, keep=1, step=6)
    assert [folder.name for folder in output.checkpoints(saved.parent)] == ["checkpoint-6"]


@pytest.mark.parametrize("steps", [40, 4], ids=["on the way", "at the end"])
def test_a_run_without_finite_steps_stops_with_its_entries(tiny, tmp_path, steps):
    """After a step at such a rate nothing is finite any more. metrics.jsonl stays JSON, and the checkpoint is
    that of the last step that was applied.
    """
    flags = ["--train_manifest", tiny / "train.json", "--base_ckpt", tiny / "model", "--lr", "1e30",
             "--audio_tokenizer", tiny / "codec", "--output_dir", tmp_path, "--batch_size", 1,
             "--grad_accum", 2, "--warmup_ratio", 0, "--max_steps", steps, "--logging_steps", 1]
    command = list(map(str, [sys.executable, "trainer.py", *flags]))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: loss or gradient not finite"):].splitlines()
    assert len(error) == 1 + trainer.HALT and all("entries [" in line for line in error[1:])
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["skipped_steps"] == trainer.HALT and metrics[-1]["loss"] is None
    assert [folder.name for folder in output.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / "adapter_model.safetensors").exists()


def metrics(step, loss=None):
    """A line of metrics.jsonl, of a step that was not finite where there is no loss."""
    return {"step": step, "lr": 1e-4, "grad_norm": loss, "loss": loss, "text_loss": loss, "audio_loss": loss,
            "audio_loss_per_codebook": 8 * [loss]}


def test_metrics_of_lost_steps_and_torn_lines_go(tmp_path):
    """A line that a kill or a power cut tore must not stop every start to come."""
    lines = [json.dumps(metrics(step)) + "\n" for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:5]) + "\n\0\0\n" + lines[5] + lines[6][:-4])
    output.open_board(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:5])
    (tmp_path / "metrics.jsonl").unlink()
    output.open_board(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_picture_shows_what_there_is(tmp_path):
    """From no line, one, or lines without a loss: a gap, and no failure of the run that draws it."""
    output.draw(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    sizes = []
    for losses in ([None], [0.0], [7.5, None, 6.5, 0.0]):
        lines = [json.dumps(metrics(step, loss)) + "\n" for step, loss in enumerate(losses)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        output.draw(tmp_path)
        sizes.append((imread(tmp_path / "loss.png")[..., :3] < 0.9).sum())
    assert max(sizes[:2]) < sizes[2]  # more ink where there are lines to show


@pytest.mark.parametrize("ranks, nodes, start", [
    (None, None, "python trainer.py"), ("8", "8", "torchrun --nproc_per_node=8 trainer.py"),
    ("8", "16", "torchrun --nnodes=2 --nproc_per_node=8 trainer.py")])
def test_the_card_has_the_command(monkeypatch, tmp_path, ranks, nodes, start):
    for name, value in (("LOCAL_WORLD_SIZE", ranks), ("WORLD_SIZE", nodes)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    options = ["--train_manifest", "my data.json", "--output_dir", "{out}"]
    monkeypatch.setattr(sys, "argv", ["trainer.py", *options])
    card = output.describe(trainer.parse_args(options), [1] * 1234, {"a": 90_000}, RUN, total=5)
    for step in (1, 2):  # the second must not show what the first did
        (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics(step, step / 3)) + "\n")
        output.write_card(tmp_path, tmp_path, card, step)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.base_model == "bosonai/higgs-audio-v2-generation-3B-base"
    assert f"{start} --train_manifest 'my data.json' --output_dir '{{out}}'\n" in text
    assert "`my data.json`: 1,234 entries, 1 clips of 1.00 hours" in text and "step 1" not in text
    assert "| loss at step 2 | text 0.667, audio 0.667 |" in text


def test_learning_rate_and_length_are_the_command_lines_on_resume(tiny, tmp_path):
    """Catches a schedule that comes from the checkpoint: the rate asked for would be ignored in silence."""
    flags = ["--train_manifest", tiny / "train.json", "--batch_size", 1, "--grad_accum", 1,
             "--warmup_ratio", 0, "--resume_from_checkpoint", "auto"]
    run(tiny, tmp_path, *flags, "--max_steps", 2, "--lr", "1e-3")
    metrics = run(tiny, tmp_path, *flags, "--max_steps", 4, "--lr", "5e-4")
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / total)).item())
              for step, total in ((1, 2), (2, 2), (3, 4), (4, 4))]
    expected = [1e-3 * cosine[0], 1e-3 * cosine[1], 5e-4 * cosine[2], 5e-4 * cosine[3]]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert [line["lr"] for line in metrics] == pytest.approx(expected, abs=1e-10)
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert adapter == (tmp_path / "checkpoint-4/adapter_model.safetensors").read_bytes()
    (tmp_path / "checkpoint-4/adapter_model.safetensors").write_bytes(adapter[:1000])  # started again, it is
    with pytest.raises(AssertionError, match="checkpoint-4 is damaged"):  # not put in the good one's place
        run(tiny, tmp_path, *flags, "--max_steps", 4)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter
