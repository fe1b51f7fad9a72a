"""Kills at fixed moments: the job goes on, and its adapter is the one of a run that was never killed."""

import json
import random

from tests.manual import kills
from tests.support import launcher


def run_to_the_end(job):
    """The job's command on its two ranks, without torchrun: what was printed."""
    done = launcher.run("tests/support/ranks.py", json.dumps({job.ranks: [kills.flags(job)]}))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_job_ends_in_the_same_adapter(tiny):
    """While encoding, in the middle of a save, one rank alone; and asked to stop, all ranks or only one.

    The adapter is the same to the byte on any machine: the same program, with as many ranks and threads and
    micro-batches of the same shapes, and gloo adds up two ranks' gradients, a sum without an order.
    """
    straight, killed = (kills.make_job(tiny, 2, name) for name in ("never_killed", "killed"))
    run_to_the_end(straight)
    expected = kills.check(straight)
    plan = [
        ("encode", 2, "machine"),
        ("save", 2, "machine"),
        ("train", 3, "ask"),
        ("train", 3, "term"),
        ("train", 3, "rank"),
    ]
    adapter, log, killings = kills.survive(killed, plan, random.Random(0))
    assert len(killings) == len(plan) and adapter == expected
    for moment, _, how, _, steps_lost, seconds, code in killings:
        print(f"{moment}, {how}: {seconds:.1f} s to the end")
        # The ranks have saved, and all have ended, before torchrun's 30 s: then it kills what still runs
        assert how not in ("ask", "term") or (steps_lost == 0 and seconds < 25), (moment, how)
        assert how != "ask" or code == 1  # torchrun's own, as a rank ended with 143
    assert log.count("stopped at step ") == 2 and 'trainer.py", line' not in log.split("stopped at step ")[1]
    assert "done before: 24 steps" in run_to_the_end(killed)  # there is nothing left to do
