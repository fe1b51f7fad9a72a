"""The README's commands: those on the embedded default run as printed, the others must parse."""

import argparse
import inspect
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
import soundfile
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine

import dataset
import lora
import trainer
import validate_pipeline
from dataset import load_manifest
from tests import acceptance
from tests.manual import speak
from tests.support import launcher, tiny_checkpoint
from tests.support.bounds import OTHER_CODES
from tests.test_controls import LEARNED

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


[SIX_COMMANDS] = blocks("bash", "# 1. ")
[RECORDINGS] = blocks("bash", "make_manifests")
[OWN_ON_TINY] = blocks("bash", "--output_dir out_tiny")
[SPEAK_TINY] = blocks("bash", "speak --base_ckpt tiny/merged")
[SPEAK_OWN] = blocks("bash", "speak --base_ckpt merged")


def test_every_block_is_known():
    """A command that no test looks at would rot: each bash block is installed, tested, run or parsed."""
    known = ("pip install", "recordings", "tiny/", "train.json", "held_out.json")
    assert all(any(word in text for word in known) for kind, text in BLOCKS if kind == "bash")


def commands_for_the_released_checkpoint():
    """[(script, its options)] of all commands on the real checkpoint."""
    for kind, text in BLOCKS:
        if kind == "bash" and "tiny/" not in text:
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                script = next((word for word in words if word.endswith(".py")), None)
                if script:
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
    assert [script for script, _ in parsed] == [check, train, train, check]
    trained = [args for script, args in parsed if script == train]
    assert all(args.resume_from_checkpoint == "auto" for args in trained)
    eight_gpus, one_gpu = [
        argparse.Namespace(**{**vars(args), "resume_from_checkpoint": None}) for args in trained
    ]
    assert eight_gpus == defaults  # "with these defaults"
    assert parsed[0][1] == one_gpu  # the preflight has "training's flags"
    assert (one_gpu.grad_accum, one_gpu.epochs) == (1, 20)  # a row of the table: five minutes
    [tried] = [line for line in SIX_COMMANDS.splitlines() if "lora.py" in line]
    assert merge[1::2] == shlex.split(tried)[3::2]  # the same options as the one that runs below
    assert Path(merge[merge.index("--adapter") + 1]).name.startswith("checkpoint-")  # the one that was chosen


def test_what_a_run_costs():
    """The table by minutes of speech is its formula's: entries, steps, time."""
    seconds_per_position = 4 * 2.8e9 / (0.21 * 990e12)
    in_minutes = {"s": 1 / 60, "minute": 1, "minutes": 1, "hour": 60, "hours": 60}

    def minutes(cell):
        value, unit = cell.split(" ")
        return float(value) * in_minutes[unit]

    rows = re.findall(r"^\| (\d+ (?:minutes|hours?)) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for speech, cells in rows:
        *numbers, flags, steps, on_one = cells.split(" | ")
        clips, one_in, trained, held_out = [int(number.replace(",", "")) for number in numbers]
        assert clips == pytest.approx(minutes(speech) * 60 / 7.2, rel=0.05)
        assert held_out == math.ceil(clips / one_in) and trained == clips - held_out
        assert 20 <= held_out <= 50 or clips == 40  # "under 20 ... chance", "at most 50 are compared"
        options = flags.strip("`").split()
        args = trainer.parse_args(["--train_manifest=m", "--output_dir=o", *options])
        samples_per_step = args.batch_size * args.grad_accum
        assert int(steps) == math.ceil(args.epochs * trained / samples_per_step)
        # Eight GPUs make as many steps with an eighth of it: "defaults, for 50 hours; for 6 hours 1"
        assert args.grad_accum == 8 * {"6 hours": 1, "50 hours": 8}.get(speech, args.grad_accum / 8)
        seconds = int(steps) * max(dataset.LOWEST_COST, samples_per_step * 480) * seconds_per_position
        assert minutes(on_one) == pytest.approx(seconds / 60, rel=0.05)
    assert "**With 40 clips use `--one_in 4`**: 30 are trained, 10 are held out" in WORDS
    assert rows[0][1].startswith("40 | 4 | 30 | 10 |")
    assert "a step costs at least 2,000 positions' time" in WORDS and dataset.LOWEST_COST == 2000


def test_sizes():
    """Memory and cache are those of the released shape."""
    parameters, adapter = 5_771_283_456, 39_452_672
    # The base in bfloat16; the adapter, its gradient and AdamW's two moments in float32
    told = re.search(r"Base, adapter and AdamW take ([\d.]+) GB", WORDS)
    assert float(told[1]) == pytest.approx((2 * parameters + 16 * adapter) / 1e9, abs=0.05)
    text_config = tiny_checkpoint.released_config().text_config
    layers, hidden = text_config.num_hidden_layers, text_config.hidden_size
    position = re.search(r"a position ([\d.]+) MB \(([\d.]+) with `--gradient_checkpointing`\)", WORDS)
    assert float(position[1]) == pytest.approx((8 + 64 * layers) * hidden / 1e6, abs=0.05)
    assert float(position[2]) == pytest.approx((71 + 2 * layers) * hidden / 1e6, abs=0.05)
    label = re.search(
        r"a trained text token ([\d.]+) MB", WORDS
    )  # logits in bfloat16 and float32, twice each
    assert float(label[1]) == pytest.approx(14 * text_config.vocab_size / 1e6, abs=0.05)
    for positions, gigabytes in ((8192, 60), (4096, 36), (1024, 18)):
        needed = float(told[1]) + positions * (float(position[1]) + float(label[1]) / 5) / 1e3
        assert (
            needed == pytest.approx(gigabytes, abs=0.6)
            and f"{positions:,}" in WORDS
            and f"{gigabytes}" in WORDS
        )
    assert "(36 GB)" in WORDS and "(18)" in WORDS
    cache = re.search(r"Codes take ([\d.]+) MB an hour", WORDS)
    assert float(cache[1]) == pytest.approx(3600 * 25 * 8 * 2 / 1e6, abs=0.05)  # 16 bits a code


def test_the_names_on_the_hub():
    """Both names of the base mean the pinned revision, and speak.py's defaults are the pinned names."""
    for name in ("bosonai/higgs-tts-2-3b-base", "bosonai/higgs-audio-v2-generation-3B-base"):
        assert name in README and lora.REVISIONS[name] == lora.REVISIONS[lora.BASE]


def test_the_manifest_is_one(tiny):
    [text] = blocks("json", "messages")
    (tiny / "readme.json").write_text(text)
    assert len(load_manifest(tiny / "readme.json")) == 2 and json.loads(text)[1]["start_index"] == 3


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, as a newcomer has it, and an environment without our hub's folder."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    folder.mkdir()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / "requirements.txt", ROOT / "README.md"]:
        shutil.copy(file, folder)  # not the recordings and the adapters of a user who runs the tests later
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return folder, environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run_in(folder, environment, *command):
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def step_by_step(clone):
    """What the blocks on the tiny checkpoint print, run in the order of the README, in one shell."""
    folder, environment = clone
    return run_in(folder, environment, "bash", "-e", "-c", SIX_COMMANDS)


def test_the_embedded_default_passes_trains_and_is_compared(clone, step_by_step):
    """validate_pipeline.py's table and last lines, then all that is done with what it keeps, as printed."""
    assert step_by_step.returncode == 0, step_by_step.stdout + step_by_step.stderr
    lines = step_by_step.stdout.splitlines()
    assert [line[6:].split(":")[0] for line in lines if line.startswith("pass  ")] == ROWS
    end = lines.index("🎉 ALL VALIDATION TESTS PASSED!")
    assert "🎉 ALL VALIDATION TESTS PASSED!" in README
    assert lines[end + 1] == "📋 Ready for training with torchrun command..."
    assert lines[end - 1].endswith("of the codes are the target's; 3 of 3 stop by themselves")
    [command] = blocks("bash", "torchrun --nproc_per_node=8")
    assert command.startswith("\n".join(lines[end + 2 : end + 5]))  # and resumes, besides
    for line in (
        "replies     3 of clip first: any engine speaks them",
        "ready for trainer.py with the same options",
        "losses of 3 entries, teacher-forced:",
        "target      entry 0: tiny/listen/0-target.wav, 1.2 s",
        "checkpoint-60 entry 0: tiny/listen/0-checkpoint-60.wav, 1.2 s",
        "smallest    loss: tiny/adapter/checkpoint-60; listen before you choose",
        "listen      open tiny/listen/index.html",
    ):
        assert line in lines, line
    assert any(line.startswith("base        entry 0: ") for line in lines)  # random weights may make sound
    assert (clone[0] / "tiny/listen/index.html").exists() and (clone[0] / "tiny/merged/config.json").exists()
    adapter = clone[0] / "tiny/adapter"
    for folder in (adapter, clone[0] / "tiny/out"):
        final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert final["step"] == 60 and final["loss"] < LEARNED
    for name in ("README.md", "args.json", "runs", "adapter_config.json", "checkpoint-60/trainer_state.pt"):
        assert (adapter / name).exists()


def test_each_line_of_the_preflight_is_explained(step_by_step):
    """And none that it does not print: the list's names are the report's, in its order."""
    [explained] = re.findall(r"after these lines:\n(.*?)\n\n", README, re.DOTALL)
    names = re.findall(r"`([^`]+)`[:,]", explained)
    lines = step_by_step.stdout.replace("device: ", "device      ").splitlines()
    printed = [line[:12].strip() for line in lines if line[11:12] == " "]
    printed = [name for name in dict.fromkeys(printed) if name in names or name in ("device", "8 GPU(s)")]
    names.remove("worth a look")  # its line is longer
    assert printed == names and "worth a look, though all of it would train: 0" in step_by_step.stdout


def test_figures_of_the_run(clone, step_by_step):
    """What the README says that the loss is, at the first and at the last step, and without training."""
    metrics = (clone[0] / "tiny/adapter/metrics.jsonl").read_text().splitlines()
    first, *_, last = [json.loads(line)["loss"] for line in metrics]
    told = re.search(r"the loss falls from ([\d.]+\d) to ([\d.]+\d)\.", WORDS)
    [base] = [line.split() for line in step_by_step.stdout.splitlines() if re.match(r"base +\d", line)]
    tiny_base = re.search(r"the tiny base's ([\d.]+\d)\.", WORDS)
    for printed, found in ((told[1], first), (tiny_base[1], float(base[2]))):
        assert float(printed) == pytest.approx(found, abs=0.05 + OTHER_CODES)
    # 60 steps at a high learning rate enlarge each rounding. Over eight other seeds it was 0.026 to 0.089,
    # and all 24 prompts were said to the length of their targets
    assert 1 / 3 < last / float(told[2]) < 3
    assert f"ln 1026 = {math.log(1026):.2f}" in WORDS


def make_hub(tiny):
    """The tiny checkpoint and codec in the hub's cache, at the revisions that the names mean."""
    for name, revision in lora.REVISIONS.items():
        snapshots = tiny / f"huggingface/hub/models--{name.replace('/', '--')}/snapshots"
        snapshots.mkdir(parents=True)
        (snapshots / revision).symlink_to(tiny / ("codec" if name == lora.CODEC else "model"))


def test_the_script_has_the_pages_values():
    """Its defaults are upstream's and the trainer's, as on the page; the README prints them."""
    upstream = inspect.signature(HiggsAudioServeEngine.generate).parameters
    script = speak.parse_args(["--manifest=held_out.json"])
    assert (script.temperature, script.top_p) == (upstream["temperature"].default, upstream["top_p"].default)
    assert script.seed == trainer.parse_args(["--train_manifest=m", "--output_dir=o"]).seed
    assert (script.base_ckpt, script.audio_tokenizer) == (lora.BASE, lora.CODEC)
    printed = speak.parse_args(shlex.split(SPEAK_OWN.splitlines()[1])[3:])
    assert vars(printed) == vars(script) | {"adapter": "out/checkpoint-300"}


def test_the_answer_is_heard(clone, step_by_step):
    """speak.py as printed, in a shell that knows nothing of tiny's HuBERT: the sound of the page.

    To the byte, though merged weights have sums in another order: logits differ by 1e-5, and of a few hundred
    draws none is as near to the border between two codes.
    """
    folder, environment = clone
    done = run_in(folder, environment, "bash", "-e", "-c", SPEAK_TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("answer.wav has 1.2 s: <|audio_out_bos|>")
    page = folder / "tiny/listen/0-checkpoint-60.wav"
    assert (folder / "answer.wav").read_bytes() == page.read_bytes()


def test_the_wanted_text_is_said(clone, step_by_step):
    """With --text the first entry's voice says the third's text; its clip has 1.0 s."""
    [option] = re.findall(r'With `(--text ".+?")` the voice', WORDS)
    command = shlex.split(f"{SPEAK_TINY.strip()} {option} --output said.wav")
    options = command[command.index("--base_ckpt") :]
    done = launcher.run("tests/manual/speak.py", *options, cwd=clone[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("said.wav has 1.0 s: <|audio_out_bos|>")


def test_an_own_model_is_heard_by_the_hubs_names(clone, step_by_step):
    """The last two commands on tiny's files under the user's names: merged and unmerged, the same sound."""
    folder, environment = clone
    make_hub(folder / "tiny")
    (folder / "merged").symlink_to("tiny/merged")
    (folder / "held_out.json").write_text((folder / "tiny/train.json").read_text())
    (folder / "clips").symlink_to("tiny/clips")
    (folder / "out").mkdir()
    (folder / "out/checkpoint-300").symlink_to(folder / "tiny/adapter/checkpoint-60")
    hub = {"HF_HOME": f"{folder}/tiny/huggingface", "HF_HUB_OFFLINE": "1"}
    answers = []
    for command in SPEAK_OWN.splitlines():
        (folder / "answer.wav").unlink(missing_ok=True)
        done = run_in(folder, environment | hub, "bash", "-e", "-c", command)
        assert done.returncode == 0, done.stderr
        answers.append((folder / "answer.wav").read_bytes())
    assert answers == [(folder / "tiny/listen/0-checkpoint-60.wav").read_bytes()] * 2


def test_own_recordings_on_the_tiny_model(clone, step_by_step):
    """From recordings to a merged model, with the commands as printed, in the shell of the six."""
    folder, environment = clone
    (folder / "recordings").mkdir()
    lines = []
    for i, text in enumerate(tiny_checkpoint.TEXTS * 2):
        wave = tiny_checkpoint.speech_like(1.0 + i / 10, seed=i)
        soundfile.write(folder / f"recordings/{i}.wav", wave, tiny_checkpoint.SAMPLE_RATE)
        lines.append(f"{i}.wav|{text} {i}")
    (folder / "recordings/metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    [shell] = [line for line in SIX_COMMANDS.splitlines() if line.startswith("export ")]
    done = run_in(folder, environment, "bash", "-e", "-c", "\n".join([shell, RECORDINGS, OWN_ON_TINY]))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "entries     3 (3 with start_index), 3 distinct clips" in lines
    assert "ready for trainer.py with the same options" in lines
    assert (folder / "listen/index.html").exists() and (folder / "merged_tiny/config.json").exists()


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
