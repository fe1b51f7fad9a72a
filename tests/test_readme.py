"""The README's commands: those on the embedded default run as printed, the others must parse."""

import json
import math
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
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
ROWS = [
    "Bit-for-bit preprocessing",
    "Identical forward kwargs",
    "Reference audio is heard",
    "Dual loss computation",
    "DualFFN LoRA targeting",
    "DDP scaling",
    "LoRA-only checkpoints",
    "It learns what inference runs",
]


def blocks(language, having):
    return [text for kind, text in BLOCKS if kind == language and having in text]


def test_every_block_is_known():
    """A command that no test looks at would rot: each bash block is installed, tested, run or parsed."""
    known = ("pip install", "tiny/", "train.json", "held_out.json")
    assert all(any(word in text for word in known) for kind, text in BLOCKS if kind == "bash")


def commands_for_the_released_checkpoint():
    """[(script, its options)] of all commands on the real checkpoint."""
    for kind, text in BLOCKS:
        if kind == "bash" and "tiny/" not in text:
            for line in text.replace("\\\n", " ").splitlines():
                if "train.json" in line or "held_out.json" in line or "lora.py" in line:
                    words = shlex.split(line)
                    [script] = [word for word in words if word.endswith(".py")]
                    program, options = words[: words.index(script)], words[words.index(script) + 1 :]
                    assert program == ["python"] or program[0] == "torchrun" and script == "trainer.py"
                    yield script, options


def test_commands_for_the_released_checkpoint_parse():
    """With the trainer's own parser; each starts as it must, and has only options that there are."""
    commands, parsed = list(commands_for_the_released_checkpoint()), []
    [merge] = [options for script, options in commands if script == "lora.py"]
    for script, options in commands:
        if "--adapter" in options:  # validate_pipeline.py's own
            options = options[: options.index("--adapter")]
        if script != "lora.py":
            parsed.append((script, trainer.parse_args(["--output_dir=out", *options])))
    defaults = trainer.parse_args(["--train_manifest=train.json", "--output_dir=out"])
    check, train = "validate_pipeline.py", "trainer.py"
    assert [script for script, _ in parsed] == [check, train, train, train, check, train, train, check]
    assert parsed[0][1] == parsed[1][1] == defaults  # "the values are also the defaults"
    assert [args.grad_accum for _, args in parsed] == [8, 8, 64, 4, 8, 64, 4, 8]
    checkpointing = [args.gradient_checkpointing for _, args in parsed]
    assert checkpointing == [False, False, False, False, True, True, False, False]
    [tried] = [line for text in blocks("bash", "tiny/") for line in text.splitlines() if "lora.py" in line]
    assert merge[1::2] == shlex.split(tried)[3::2]  # the same options as the one that runs below


def test_what_a_run_costs():
    """The table of hours, steps and times is its formula's, and so are the steps told for little data."""
    number = {"thousand": 1e3, "million": 1e6, "minutes": 60, "s": 1, "hour": 60, "hours": 60, "MB": 1}

    def read(cell):
        value, _, unit = cell.partition(" ")
        return float(value.replace(",", "")) * number.get(unit, 1)

    rows = re.findall(r"^\| (\d+ (?:minutes|hours?)) (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for speech, cells in rows:
        minutes = read(speech) / (60 if "minutes" in speech else 1)
        samples, steps, positions, on_one, on_eight, cache = cells.strip("| ").split(" | ")
        assert read(samples) == int(0.95 * minutes * 60 / 7.2)
        assert read(steps) == 2 * math.ceil(read(samples) / 128)
        expected = 2 * read(samples) * 480
        assert read(positions) == pytest.approx(expected, rel=0.1)
        seconds = expected * 4 * 2.8e9 / (0.4 * 990e12)
        assert read(on_one) == pytest.approx(seconds, rel=0.1)
        if on_eight == "under 1 s":
            assert seconds < 8
        else:
            assert read(on_eight) == pytest.approx(seconds / 8, rel=0.25)
        assert read(cache) == pytest.approx(minutes * 60 * 25 * 8 * 2 / 1e6, rel=0.2)  # 16 bits a code
    assert 10 * math.ceil(79 / 2) == 400 and "`--grad_accum 1\n--epochs 10` on one GPU makes 400" in README
    assert 5 * math.ceil(475 / 8) == 300 and "--grad_accum 4 --epochs 5" in README


def test_the_manifest_is_one(tiny):
    [text] = blocks("json", "messages")
    (tiny / "readme.json").write_text(text)
    assert len(load_manifest(tiny / "readme.json")) == 2 and json.loads(text)[1]["start_index"] == 3


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, as a newcomer has it, and an environment without our hub's folder."""
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
    [commands] = blocks("bash", "tiny/")
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
    [preflight] = blocks("", "and trained on")
    for line in preflight.splitlines():  # "..." leaves out
        assert line.split("...")[0] in step_by_step.stdout
    for line in (
        "reference   of entry 0 is heard as codes",
        "losses      of 3 entries, teacher-forced",
        "base        emits no audio",
        "adapter     tiny/listen/adapter.wav, 1.2 s",
        "best        tiny/adapter, by",
    ):
        assert line in step_by_step.stdout
    adapter = clone[0] / "tiny/adapter"
    for folder in (adapter, clone[0] / "tiny/out"):
        final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert final["step"] == 60 and final["loss"] < 0.05
    for name in (
        "README.md",
        "args.json",
        "loss.png",
        "runs",
        "adapter_config.json",
        "checkpoint-60/trainer_state.pt",
    ):
        assert (adapter / name).exists()


def make_hub(tiny):
    """The tiny checkpoint and codec in the hub's cache, at the revisions that the README's script names."""
    revisions = {
        "higgs-audio-v2-generation-3B-base": ("model", "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"),
        "higgs-audio-v2-tokenizer": ("codec", "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"),
    }
    for name, (folder, revision) in revisions.items():
        snapshots = tiny / f"huggingface/hub/models--bosonai--{name}/snapshots"
        snapshots.mkdir(parents=True)
        (snapshots / revision).symlink_to(tiny / folder)


def test_the_answer_is_heard(clone, step_by_step):
    """The listening script: upstream's engine on the merged folder; 30 frames are 1.2 s. Then, as its
    comments say, from the hub's names with the adapter unmerged: the same. The second layout is ChatML, too.
    """
    folder, environment = clone
    hub = {"HF_HOME": f"{folder}/tiny/huggingface", "HF_HUB_OFFLINE": "1"}
    [script] = blocks("python", "HiggsAudioServeEngine")
    make_hub(folder / "tiny")
    loads, prompts, speaks = re.split(r"^(voice, .*?)(?=^answer)", script, flags=re.MULTILINE | re.DOTALL)
    from_hub = re.sub("^# ", "", loads, flags=re.MULTILINE).replace('"out"', '"tiny/adapter"')
    assert from_hub.count("\nmodel = snapshot_") == from_hub.count("\ncodec = snapshot_") == 1
    both = f"{script}\n{from_hub}{prompts}{speaks}"
    done = run_in(folder, environment | hub, sys.executable, "-c", both)
    assert done.returncode == 0, done.stderr
    merged, unmerged = [line for line in done.stdout.splitlines() if " seconds of " in line]
    assert merged == unmerged and merged.startswith("1.2 seconds of <|audio_out_bos|>")
    assert (folder / "tiny/answer.wav").stat().st_size > 24_000
    names = {}
    exec(re.sub("^# ", "", prompts, flags=re.MULTILINE), names)
    assert [turn["role"] for turn in names["prompt"]] == ["user", "assistant", "user"]
    (folder / "second.json").write_text(json.dumps([{"messages": [*names["prompt"], names["prompt"][1]]}]))
    load_manifest(folder / "second.json")


def test_a_failed_check_is_named(monkeypatch, tmp_path):
    """Catches a validation that prints its last lines whatever happened."""
    for name, value in acceptance.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["validate_pipeline.py", "--keep", str(tmp_path)])
    for name in ("train", "open_lab"):
        monkeypatch.setattr(acceptance, name, lambda folder: None)
    monkeypatch.setattr(acceptance.tiny_checkpoint, "make_everything", lambda folder: None)
    table = {"good": lambda lab: (True, "1"), "bad": lambda lab: (False, "0")}
    monkeypatch.setattr(acceptance, "TABLE", table)
    with pytest.raises(SystemExit, match="^FAILED: bad$"):
        validate_pipeline.main()
