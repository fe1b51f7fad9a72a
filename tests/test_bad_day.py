"""What other people's days bring: a killed parent, a stopped run, half a download, a table as a manifest."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dataset
from dataset import UserError

ROOT = Path(__file__).parent.parent
HANGS = 600  # seconds: imports alone take ten, and many times that on a cold disk and busy cores


def wait_until(condition, seconds):
    """Whether `condition()` became true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("program", ["worker", "rank"])
def test_children_end_with_a_killed_parent(tmp_path, program):
    """Catches a worker that waits for ever on a full pipe whose reading end it holds itself, and a rank that
    outlives torchrun."""
    programs = {
        "worker": """
import pathlib, numpy, os, sys, time
import dataset
def make(i):
    if i == 0:
        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    return numpy.zeros(10_000_000)
items = iter(dataset.in_workers(make, range(1000), 1))
next(items)
time.sleep(600)
""",
        "rank": """
import os, pathlib, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "none"
if os.fork():
    time.sleep(600)
import trainer  # before its own imports, which take long, it asks to end with its parent
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
""",
    }
    file = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", programs[program], str(file)], cwd=ROOT)
    try:
        assert wait_until(lambda: file.exists() and file.read_text(), HANGS)
        time.sleep(1)  # the worker has filled its pipe
        child = int(file.read_text())
        assert is_alive(child)
    finally:
        parent.kill()
        parent.wait()
    ended = wait_until(lambda: not is_alive(child), HANGS)
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended


def test_a_stopped_run_is_not_a_finished_one(tiny, tmp_path):
    """Catches `python trainer.py ... && merge` that takes a stopped run for a finished one."""
    out = tmp_path / "out"
    entry = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    (tmp_path / "texts.json").write_text(json.dumps(4 * [{"messages": entry}]))
    flags = [
        f"--train_manifest={tmp_path}/texts.json",
        f"--output_dir={out}",
        f"--base_ckpt={tiny}/model",
        f"--audio_tokenizer={tiny}/codec",
        "--num_workers=0",
        "--logging_steps=1",
        "--max_steps=10000",
    ]
    running = subprocess.Popen([sys.executable, "trainer.py", *flags], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert wait_until(lambda: (out / "metrics.jsonl").exists(), HANGS)
        running.terminate()
        told, _ = running.communicate(timeout=HANGS)
    finally:
        running.kill()
    assert running.returncode == 143 and b"all is saved" in told
    assert list(out.glob("checkpoint-*")) and not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("kept", [["config.json"], ["config.json", "tokenizer*", "special_tokens_map.json"]])
def test_half_a_base_is_told_with_the_command_that_downloads_it(tiny, open_data, entries, tmp_path, kept):
    for pattern in kept:
        for file in (tiny / "model").glob(pattern):
            shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="not whole.* hf download bosonai/.* --revision [0-9a-f]{40}"):
        open_data(entries, model=tmp_path)


def test_a_table_given_as_manifest_names_the_program_that_reads_it(tmp_path):
    table = tmp_path / "metadata.csv"
    table.write_text("a.wav|hello|Sara\nb.wav|good day|Sara\n")
    with pytest.raises(UserError, match="make_manifests"):
        dataset.load_manifest(table)
