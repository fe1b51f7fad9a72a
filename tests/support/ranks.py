"""Run trainer.train on so many forked ranks; under torchrun each of them would first import, for seconds.

    python -m tests.support.ranks '{"2": [["--train_manifest=train.json", "--output_dir=out"]]}'

{world size: [flags of a run, ...]}, as JSON. The runs of one world size share its processes.
"""

import json
import os
import signal
import sys

import torch.distributed as dist
from torch.multiprocessing import start_processes

import trainer


def run_rank(rank, world_size, port, runs):
    """What torchrun tells a rank, then the runs."""
    signal.alarm(600)  # a rank that waits for ever ends by it
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=world_size,
        MASTER_ADDR="localhost",
        MASTER_PORT=port,
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    trainer.run_and_exit(train_all, runs)


def train_all(runs):
    """The runs, one after the other. A process can join its group only once: they share it."""
    device = trainer.start()
    trainer.start = lambda: device
    for flags in runs:
        trainer.train(trainer.parse_args(flags))


for world_size, runs in json.loads(sys.argv[1]).items():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # at a free port
    arguments = world_size, str(store.port), runs
    ranks = start_processes(run_rank, arguments, nprocs=int(world_size), join=False, start_method="fork")
    while not ranks.join(grace_period=1):  # the first that fails ends the others, as under torchrun
        pass
