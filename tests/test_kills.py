"""Kills at fixed moments: the job goes on, and its adapter is the one of a run that was never killed."""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests import kills
from tests.kills import ROOT

def test_a_killed_job_ends_in_the_same_adapter(tiny):
    """While encoding, in the middle of a save, one rank alone; and asked to stop, all ranks or only one."""
    straight = kills.make_job(tiny, 2, "never_killed")
    killed = kills.make_job(tiny, 2, "killed")
    expected, _ = kills.finish(straight, kills.start(straight))
    plan = [("encode", 2, "machine"), ("save", 2, "machine"), ("train", 3, "ask"), ("train", 3, "term"),
            ("train", 3, "rank")]
    adapter, log, done = kills.survive(killed, plan, random.Random(0))
    assert len(done) == len(plan) and adapter == expected
    for moment, _, how, _, steps_lost, seconds, code in done:
        assert how not in ("ask", "term") or (steps_lost == 0 and seconds < 25), (moment, how)
        assert how != "ask" or code == 0  # torchrun's own, when it was not signalled itself
    assert log.count("stopped at step ") == 2 and "Traceback" not in log.split("stopped at step ")[1]
    again = kills.start(killed, restarts=0)
    assert again.wait() == 0 and "finished before: 24 steps" in killed.log.read_text()


WAITS = """
import time, trainer
trainer.catch_signals()
print("waiting", flush=True)
while True:
    time.sleep(0.1)  # a step: handlers run between two instructions of Python
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    """One that comes in the same moment, as torchrun passes it on, is none."""
    program = subprocess.Popen([sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE)
    assert program.stdout.readline() == b"waiting\n"
    for pause in (0.1, 2.5, 0):
        program.send_signal(number)
        time.sleep(pause)
        if pause:
            assert program.poll() is None
    assert program.wait(timeout=2) == 128 + number
