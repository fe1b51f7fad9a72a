"""The README's commands: those on the embedded default run as printed, the others must parse."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
import validate_pipeline
from dataset import load_manifest
from tests import acceptance

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
ROWS = ["Bit-for-bit preprocessing", "Identical forward kwargs", "Reference audio is heard",
        "Dual loss computation", "DualFFN LoRA targeting", "DDP scaling", "LoRA-only checkpoints",
        "It learns what inference runs"]


def blocks(language, having):
    return [text for kind, text in BLOCKS if kind == language and having in text]


def test_every_block_is_known():
    """A command that no test looks at would rot: each bash block is installed, tested, run or parsed."""
    known = ("pip install", "pytest tests", "tiny/", "train.json", "held_out.json")
    assert all(any(word in text for word in known) for kind, text in BLOCKS if kind == "bash")


def test_commands_for_the_released_checkpoint_parse():
    """With the trainer's own parser; each starts as it must, and has only options that there are."""
    commands = [shlex.split(line) for kind, text in BLOCKS if kind == "bash" and "tiny/" not in text
                for line in text.replace("\\\n", " ").splitlines() if ".json" in line]
    parsed = []
    for command in commands:
        [script] = [word for word in command if word.endswith(".py")]
        program, options = command[: command.index(script)], command[command.index(script) + 1 :]
        assert program == ["python"] or program[0] == "torchrun" and script == "trainer.py"
        if "--adapter" in options:  # validate_pipeline.py's own
            options = options[: options.index("--adapter")]
        parsed.append((script, trainer.parse_args(["--output_dir=out", *options])))
    defaults = trainer.parse_args(["--train_manifest=train.json", "--output_dir=out"])
    assert [script for script, _ in parsed] == ["validate_pipeline.py", *4 * ["trainer.py"],
                                                "validate_pipeline.py"]
    assert parsed[0][1] == parsed[1][1] == defaults  # "These values are also the defaults"
    assert [args.grad_accum for _, args in parsed] == [8, 8, 64, 64, 4, 8]
    assert [args.gradient_checkpointing for _, args in parsed] == [False, False, False, True, False, False]


def test_the_manifest_is_one(tiny):
    [text] = blocks("json", "messages")
    (tiny / "readme.json").write_text(text)
    assert len(load_manifest(tiny / "readme.json")) == 2 and json.loads(text)[1]["start_index"] == 3


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, as a newcomer has it, and the environment without ours."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "tiny"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return folder, environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run_in(folder, environment, *command):
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def step_by_step(clone):
    """What the blocks on the tiny checkpoint print, run in the order of the README, in one shell."""
    folder, environment = clone
    commands = "\n".join(blocks("bash", "tiny/"))
    return run_in(folder, environment, "bash", "-e", "-c", commands)


def test_the_embedded_default_passes_trains_and_is_compared(clone, step_by_step):
    """validate_pipeline.py's table and last lines, then all that is done with what it keeps, as printed."""
    assert step_by_step.returncode == 0, step_by_step.stdout + step_by_step.stderr
    lines = step_by_step.stdout.splitlines()
    assert [line[6:].split(":")[0] for line in lines if line.startswith("pass  ")] == ROWS
    end = lines.index("🎉 ALL VALIDATION TESTS PASSED!")
    assert lines[end + 1] == "📋 Ready for training with torchrun command..."
    [released] = blocks("bash", "torchrun --nproc_per_node=8")
    command = released[released.index("torchrun") :]
    assert "\n".join(lines[end + 2 :]).startswith(command.strip())
    _, compared, preflight = [text for kind, text in BLOCKS if kind == ""]
    for line in preflight.splitlines():  # times and memory differ, and "..." leaves out
        assert line.split("...")[0].split(";")[0] in step_by_step.stdout
    for word in re.findall(r"[a-z/_]{4,}", compared):  # the digits are one machine's
        assert word in step_by_step.stdout, word
    assert "best        tiny/adapter, by" in step_by_step.stdout
    adapter = clone[0] / "tiny/adapter"
    metrics = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 120 and metrics[-1]["loss"] < 0.05
    for name in ("README.md", "loss.png", "runs", "adapter_config.json", "checkpoint-120/trainer_state.pt"):
        assert (adapter / name).exists()


def test_the_answer_is_heard(clone, step_by_step):
    """The listening script: upstream's engine on the merged folder; 30 frames are 1.2 s."""
    folder, environment = clone
    hub = {"HF_HOME": f"{folder}/tiny/huggingface", "HF_HUB_OFFLINE": "1"}
    [script] = blocks("python", "HiggsAudioServeEngine")
    done = run_in(folder, environment | hub, sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("1.2 seconds of <|audio_out_bos|>")
    assert (folder / "tiny/answer.wav").stat().st_size > 24_000


def test_a_failed_check_is_named(monkeypatch, tmp_path):
    """Catches a validation that prints its last lines whatever happened."""
    hub = {"HF_HOME": f"{tmp_path}/huggingface", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    for name, value in hub.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["validate_pipeline.py", "--keep", str(tmp_path)])
    for name in ("train", "open_lab"):
        monkeypatch.setattr(acceptance, name, lambda folder: None)
    monkeypatch.setattr(acceptance.tiny_checkpoint, "make_everything", lambda folder: None)
    table = {"good": lambda lab: (True, "1"), "bad": lambda lab: (False, "0")}
    monkeypatch.setattr(acceptance, "TABLE", table)
    with pytest.raises(SystemExit, match="^FAILED: bad$"):
        validate_pipeline.main()
