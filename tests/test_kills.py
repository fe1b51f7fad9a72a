"""Kills at fixed moments: the job goes on, and its adapter is the one of a run that was never killed."""

import random
import signal
import time

import pytest
import torch

import trainer
from tests import kills


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


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(handlers, monkeypatch, number):
    """Before training the first one does; and one that torchrun passes on in the same moment is none."""
    ended = []
    monkeypatch.setattr(trainer.os, "_exit", ended.append)
    halt = torch.tensor([-1, 0])
    trainer.catch_signals(halt)
    with pytest.raises(SystemExit) as exit:
        signal.raise_signal(number)
    assert exit.value.code == 0
    halt[0] = 0
    signal.raise_signal(number)
    signal.raise_signal(number)
    assert halt[0] == trainer.HALT and not ended
    now = time.monotonic()
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now + 3)
    signal.raise_signal(number)
    assert ended == [128 + number]
