"""The README's commands: those on the embedded default run as printed, the others must parse."""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora
import trainer
import validate_pipeline
from dataset import load_manifest
from tests import acceptance
from tests.support.tiny_checkpoint import released_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())  # in one line: a phrase may be wrapped
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
    known = ("pip install", "recordings", "tiny/", "train.json", "held_out.json", "lora.py merge")
    assert all(any(word in text for word in known) for kind, text in BLOCKS if kind == "bash")


def commands_for_the_released_checkpoint():
    """[(script, its options)] of all commands on the real checkpoint."""
    for kind, text in BLOCKS:
        if kind == "bash" and "tiny/" not in text:
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("#"):
                    continue
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
    assert [script for script, _ in parsed] == [check, train, train, train, train, train, check]
    trained = [args for script, args in parsed if script == train]
    assert all(args.resume_from_checkpoint == "auto" for args in trained)
    eight_gpus = argparse.Namespace(**{**vars(trained[0]), "resume_from_checkpoint": None})
    assert parsed[0][1] == eight_gpus == defaults  # "the values are also the defaults"
    assert [args.grad_accum for args in trained] == [8, 64, 4, 64, 4]
    assert [args.gradient_checkpointing for args in trained] == [False, False, False, True, False]
    assert all(args.save_total_limit == 10 for args in trained)  # "keeps its ten checkpoints"
    [tried] = [line for text in blocks("bash", "tiny/") for line in text.splitlines() if "lora.py" in line]
    assert merge[1::2] == shlex.split(tried)[3::2]  # the same options as the one that runs below
    assert Path(merge[merge.index("--adapter") + 1]).name.startswith("checkpoint-")  # the one that was chosen


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
        assert read(steps) == math.ceil(2 * read(samples) / 128)
        expected = 2 * read(samples) * 480
        assert read(positions) == pytest.approx(expected, rel=0.02)
        seconds = expected * 4 * 2.8e9 / (0.21 * 990e12)
        assert read(on_one) == pytest.approx(seconds, rel=0.05)
        if on_eight == "under 1 s":
            assert seconds < 8
        else:
            assert read(on_eight) == pytest.approx(seconds / 8, rel=0.05)
        assert read(cache) == pytest.approx(minutes * 60 * 25 * 8 * 2 / 1e6, rel=0.2)  # 16 bits a code
    assert math.ceil(10 * 79 / 2) == 395 and "make 395 with `--grad_accum 1 --epochs 10`" in WORDS
    assert (
        math.ceil(5 * 475 / 8) == 297 and "makes 297 with" in WORDS and "--grad_accum 4 --epochs 5" in README
    )


def test_what_a_gpu_holds():
    """Positions and gigabytes told for GPUs of 24 and 80 GB are fit_max_tokens' and the weights' own."""
    adapter, base = 39_452_672, 2 * 5_771_283_456  # in bfloat16
    assert f"take {(base + 16 * adapter) / 1e9:.1f} GB of a GPU" in WORDS
    shape = SimpleNamespace(numel=lambda: adapter, requires_grad=True)
    model = SimpleNamespace(config=released_config(), parameters=lambda: [shape])

    def positions(gigabytes, *flags):
        args = trainer.parse_args(["--train_manifest=train.json", "--output_dir=out", *flags])
        return lora.fit_max_tokens(args, model, gigabytes * 2**30 - 0.8e9 - base - 4 * adapter)

    told = "1,024 positions (40 s) on 24 GB, 8,192 on 80 GB, and 16,384, the most, on either with that flag"
    assert told in WORDS and 1024 // 25 == 40
    assert (positions(24), positions(80)) == (1024, 8192)
    assert {positions(size, "--gradient_checkpointing") for size in (24, 80)} == {16_384}


def test_the_pins_are_those_of_the_trainer():
    """The listening script names the revisions that the names on the hub mean here, and both of the base."""
    [script] = blocks("python", "HiggsAudioServeEngine")
    named = re.findall(r'hub\("(.+?)", revision="(.+?)"\)', script)
    assert len(named) == 2 and all(lora.REVISIONS[name] == revision for name, revision in named)
    assert all(f"bosonai/higgs-{name}" in README for name in ("tts-2-3b-base", "audio-v2-generation-3B-base"))


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
    assert "🎉 ALL VALIDATION TESTS PASSED!" in README
    assert lines[end + 1] == "📋 Ready for training with torchrun command..."
    assert lines[end - 1].startswith(
        f"pass  {ROWS[-1]}: 100.0%, 100.0%, 100.0% of the codes are the target's; 3 of 3"
    )
    [command] = [text for text in blocks("bash", "torchrun --nproc_per_node=8") if "tiny" not in text]
    assert command.startswith("\n".join(lines[end + 2 : end + 5]))  # and resumes, besides
    for line in (
        "reference   heard, in turns of: user",
        "replies     3 of clip first: any engine speaks them",
        "ready for trainer.py with the same options",
        "losses of 3 entries, teacher-forced:",
        "target      entry 0: tiny/listen/0-target.wav, 1.2 s",
        "checkpoint-60 entry 0: tiny/listen/0-checkpoint-60.wav, 1.2 s",
        "smallest    loss: tiny/adapter/checkpoint-60; listen before you choose",
        "listen      open tiny/listen/index.html",
    ):
        assert line in lines, line
    assert any(line.startswith("base        entry 0: no audio: ") for line in lines)
    assert (clone[0] / "tiny/listen/index.html").exists() and (clone[0] / "tiny/merged/config.json").exists()
    adapter = clone[0] / "tiny/adapter"
    for folder in (adapter, clone[0] / "tiny/out"):
        final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert final["step"] == 60 and final["loss"] < 0.05
    for name in ("README.md", "args.json", "runs", "adapter_config.json", "checkpoint-60/trainer_state.pt"):
        assert (adapter / name).exists()


def test_each_line_of_the_preflight_is_explained(step_by_step):
    """And none that it does not print: the list's names are the report's, in its order."""
    [explained] = re.findall(r"after these lines:\n(.*?)\n\n", README, re.DOTALL)
    names = re.findall(r"`([^`]+)`[:,]", explained)
    lines = step_by_step.stdout.replace("device: ", "device      ").splitlines()
    printed = [line[:12].strip() for line in lines if line[11:12] == " "]
    printed = [name for name in dict.fromkeys(printed) if name in names or name in ("device", "8 GPU(s)")]
    assert names[-1] == "worth a look"  # only where there is something
    assert printed == names[:-1]


def test_figures_of_the_run(clone, step_by_step):
    """What the README says that the loss is, at the first and at the last step, and without training."""
    metrics = (clone[0] / "tiny/adapter/metrics.jsonl").read_text().splitlines()
    first, *_, last = [json.loads(line)["loss"] for line in metrics]
    told = re.search(r"the loss falls from ([\d.]+\d) to ([\d.]+\d)\.", WORDS)
    assert float(told[1]) == pytest.approx(first, abs=0.06) and float(told[2]) == pytest.approx(
        last, abs=0.01
    )
    [base] = [line.split() for line in step_by_step.stdout.splitlines() if re.match(r"base +\d", line)]
    assert f"the tiny base's {float(base[2]):.1f}." in WORDS
    assert f"ln 1026 = {math.log(1026):.2f}" in WORDS


def make_hub(tiny):
    """The tiny checkpoint and codec in the hub's cache, at the revisions that the names mean."""
    for name, revision in lora.REVISIONS.items():
        snapshots = tiny / f"huggingface/hub/models--{name.replace('/', '--')}/snapshots"
        snapshots.mkdir(parents=True)
        (snapshots / revision).symlink_to(tiny / ("codec" if name == lora.CODEC else "model"))


def test_the_answer_is_heard(clone, step_by_step):
    """The listening script: upstream's engine on the merged folder; 30 frames are 1.2 s. Then, as its
    comments say, from the hub's names with the adapter unmerged: the same.
    """
    folder, environment = clone
    hub = {"HF_HOME": f"{folder}/tiny/huggingface", "HF_HUB_OFFLINE": "1"}
    [script] = blocks("python", "HiggsAudioServeEngine")
    make_hub(folder / "tiny")
    name = re.compile(r"^(model|codec|adapter|manifest) = \S+  # (?:.*; or )?(.*)$", re.MULTILINE)
    assert [found[1] for found in name.finditer(script)] == ["model", "codec", "adapter", "manifest"]
    own = name.sub(r"\1 = \2", script)
    for theirs, ours in (("out/checkpoint-300", "tiny/adapter/checkpoint-60"), ("held_out", "tiny/train")):
        assert own.count(theirs) == 1
        own = own.replace(theirs, ours)
    assert own.count(" = hub(") == 2 and "tiny/merged" not in own
    done = run_in(folder, environment | hub, sys.executable, "-c", script + own)
    assert done.returncode == 0, done.stderr
    merged, unmerged = [line for line in done.stdout.splitlines() if line.startswith("answer.wav has ")]
    assert merged == unmerged and merged.startswith("answer.wav has 1.2 s: <|audio_out_bos|>")
    assert (folder / "answer.wav").stat().st_size > 24_000


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
