"""Kill real runs of trainer.py at any moment, start them again, compare the adapter's bytes and the metrics.

    python -m tests.manual.kills [--kills 30] [--seed 0]

makes a tiny checkpoint and prints a line for each kill and each finished run. test_kills.py has fixed ones.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
Job = namedtuple("Job", "folder ranks output_dir cache log")  # folder: the tiny checkpoint's


def make_job(folder, ranks, name):
    (folder / name).mkdir()
    return Job(folder, ranks, folder / name / "out", folder / name / "cache", folder / name / "log")


def flags(job):
    return [
        f"--train_manifest={job.folder}/train.json",
        f"--output_dir={job.output_dir}",
        f"--base_ckpt={job.folder}/model",
        f"--audio_tokenizer={job.folder}/codec",
        "--batch_size=1",
        f"--code_cache={job.cache}",
        "--grad_accum=2",
        "--num_workers=1",
        "--logging_steps=1",
        "--save_steps=2",
        f"--max_steps={STEPS}",
        "--resume_from_checkpoint=auto",
    ]


def start(job, restarts=0, how=None):
    """torchrun, as a user would start it, and start it again. Where the next kill is all processes' at once,
    torchrun's too, the ranks are forked instead: they import but once.
    """
    if how == "machine":
        command = ["tests.support.ranks", json.dumps({job.ranks: [flags(job)]})]
    else:
        command = [
            "torch.distributed.run",
            "--standalone",
            f"--max_restarts={restarts}",
            f"--nproc_per_node={job.ranks}",
            "trainer.py",
            *flags(job),
        ]
    # Else on one node a restart's ranks find the addresses of dead ones in torchrun's store
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(job.log, "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=log, stderr=log, env=environment
        )


def processes(job, ranks_only=False):
    """Ids of the job's living processes: torchrun or tests/support/ranks.py, the ranks, their workers."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().decode() if entry.name.isdecimal() else ""
            if f"--output_dir={job.output_dir}" in command:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                found.append((int(entry.name), int(parent), "torch.distributed.run" in command))
    torchruns = [pid for pid, _, is_torchrun in found if is_torchrun]
    return [pid for pid, parent, _ in found if not ranks_only or parent in torchruns]


def logged(job):
    """The steps in metrics.jsonl, each once; a line that is being written does not count."""
    file = job.output_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return sorted(
        {json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")}
    )


def wait_for(moment, amount, job, running):
    """Wait for a moment of the run: start (seconds), encode (clips), train (steps), save (times).

    Returns whether it came before the run ended.
    """
    began, saves, saving, before = time.monotonic(), 0, False, max(logged(job), default=0)
    clips = len(list(job.cache.glob("*.npy")))
    while running.poll() is None:
        was, saving = saving, (job.output_dir / "unfinished").exists()
        saves += saving and not was
        come = {
            "start": time.monotonic() - began >= amount,
            "encode": len(list(job.cache.glob("*.npy"))) >= clips + amount,
            "train": max(logged(job), default=0) >= before + amount,
            "save": saves >= amount,
        }
        if come[moment]:
            return True
        time.sleep(0.001 if moment == "save" else 0.01)  # a save can take 17 ms
    return False


def kill(job, running, how, rng):
    """how: machine (SIGKILL to all at once), rank (to one), term (SIGTERM to torchrun), ask (to one rank)."""
    victims = {"machine": processes(job), "term": [running.pid]}.get(how) or processes(job, ranks_only=True)
    for pid in victims if how in ("machine", "term") else victims and [rng.choice(victims)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if how in ("machine", "rank") else signal.SIGTERM)
    if how != "rank":
        return running.wait(timeout=60)


def check(job):
    """Look at what a finished job has left; returns the adapter's bytes."""
    assert logged(job) == list(range(1, STEPS + 1))  # each step, whatever was lost and done again
    assert not list(job.output_dir.glob("*unfinished*"))
    assert all(np.load(file).ndim == 2 for file in job.cache.glob("*.npy"))  # none is torn
    return (job.output_dir / "adapter_model.safetensors").read_bytes()


def finish(job, running):
    """Wait for the end, which must be a good one. Returns (the adapter's bytes, all that was printed)."""
    assert running.wait(timeout=300) == 0, job.log.read_text()
    return check(job), job.log.read_text()


def survive(job, plan, rng):
    """Run `job`, killing it as the plan says, [(moment, amount, how)]; returns finish()'s two, and the kills.

    A kill is (moment, amount, how, last step logged, steps to be done again, seconds to its end, exit code).
    Where one rank was killed, torchrun's --max_restarts goes on; after the others the job is started again.
    """
    kills, restarts, running = [], sum(how == "rank" for _, _, how in plan), None
    for moment, amount, how in plan:
        # torchrun would start anew what was asked to stop, too, as it then ends with 143
        running = running or start(job, restarts if how == "rank" else 0, how)
        if not wait_for(moment, amount, job, running):
            break
        step, began = max(logged(job), default=0), time.monotonic()
        code, took = kill(job, running, how, rng), time.monotonic() - began
        saved = max((int(path.name[11:]) for path in job.output_dir.glob("checkpoint-*")), default=0)
        kills.append((moment, amount, how, step, max(step - saved, 0), took, code))
        if how != "rank":
            running = None
    return *finish(job, running or start(job)), kills


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HOME=f"{folder}/huggingface", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, "-m", "tests.support.tiny_checkpoint", folder], cwd=ROOT, check=True)
        folder, straight, done, lost = Path(folder).resolve(), {}, 0, 0
        for ranks in (2, 3):
            job, began = make_job(folder, ranks, f"straight{ranks}"), time.monotonic()
            straight[ranks], _ = finish(job, start(job))
            print(f"{ranks} ranks, never killed: {time.monotonic() - began:.1f} s", flush=True)
        while done < args.kills:
            ranks = rng.choice((2, 3))
            plan = [("encode", rng.randint(1, 3)), ("start", rng.uniform(0, 12))]
            plan += [(moment, rng.randint(1, 4)) for moment in rng.choices(["train", "save"], k=3)]
            plan = [(*point, rng.choice(("machine", "machine", "rank", "term", "ask"))) for point in plan]
            job = make_job(folder, ranks, f"run{done}")
            adapter, _, kills = survive(job, plan, rng)
            same = adapter == straight[ranks]
            differing = sum(a != b for a, b in zip(adapter, straight[ranks]))
            for moment, amount, how, step, repeated, took, code in kills:
                done += 1
                lost += repeated
                print(
                    f"kill {done}: {ranks} ranks, {moment} {amount:.3g}, {how}, after step {step}, "
                    f"{repeated} steps lost, exit {code} after {took:.1f} s",
                    flush=True,
                )
            print(f"finished after {len(kills)} kills: {differing} bytes differ", flush=True)
            assert same, job.log.read_text()
        print(f"{done} kills survived, {lost / done:.1f} of {STEPS} steps lost per kill")


if __name__ == "__main__":
    main()
