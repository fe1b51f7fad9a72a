"""DataLoader workers: no run hangs on them, whatever happens to them or to what they send."""

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trainer
from tests.support import launcher

ROOT = Path(__file__).parent.parent


def flags(tiny, out, manifest, *more):
    return [
        f"--train_manifest={manifest}",
        f"--base_ckpt={tiny}/model",
        f"--audio_tokenizer={tiny}/codec",
        f"--output_dir={out}",
        "--batch_size=1",
        "--num_workers=1",
        "--logging_steps=1",
        *more,
    ]


@pytest.fixture
def texts(tmp_path):
    """A manifest of 64 entries that need no codec."""
    entry = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    (tmp_path / "texts.json").write_text(json.dumps(64 * [{"messages": entry}]))
    return tmp_path / "texts.json"


def test_64_micro_batches_need_no_64_files(tiny, tmp_path, texts):
    """Catches tensors in what a worker sends: each is an open file, and Ubuntu's default is 1024 of them."""
    # max_tokens of 1 makes each entry a micro-batch of its own
    many = ["--grad_accum=64", "--max_tokens=1", "--max_steps=2"]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        done = subprocess.run(
            [
                sys.executable,
                "trainer.py",
                *flags(tiny, tmp_path / "out", texts, *many),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert done.returncode == 0, done.stderr
    assert "done: 2 steps" in done.stdout


def workers_of(pid):
    """Ids of the processes that `pid` has forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_killed_ends_the_run(tiny, tmp_path, texts):
    """Catches a main process that waits for ever for what a dead worker would have sent."""
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, "trainer.py", *flags(tiny, out, texts, "--grad_accum=8", "--max_steps=10000")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.1)
        began = time.monotonic()
        for worker in workers_of(running.pid):
            os.kill(worker, signal.SIGKILL)
        _, told = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 1 and time.monotonic() - began < 60
    assert "DataLoader worker" in told


def test_a_bug_in_a_worker_keeps_its_traceback(tiny, tmp_path, texts):
    program = """
import dataset, trainer
def broken(self, index):
    raise TypeError("a bug of ours")
dataset.StepDataset.load_sample = broken
trainer.run_and_exit(trainer.train, trainer.parse_args())
"""
    done = launcher.run("-c", program, *flags(tiny, tmp_path / "out", texts, "--max_steps=1"))
    assert done.returncode == 1 and "TypeError: a bug of ours" in done.stderr and "load_sample" in done.stderr


def test_the_largest_micro_batch_fills_the_limit(open_data, lora_model):
    """Catches one that is larger or smaller than training's can be."""
    entry = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "good day"}]
    data = open_data(64 * [{"messages": entry}])
    length = data.load_sample(0)[0]
    for limit in (1, 1024):
        args = SimpleNamespace(max_tokens=limit, batch_size=64, grad_accum=1)
        model, lengths = copy.deepcopy(lora_model), 64 * [length]
        _, _, counts = trainer.wrap_in_ddp(model, data, lengths, args, torch.device("cpu"))
        assert counts[-1] == max(1, limit // length) * length
