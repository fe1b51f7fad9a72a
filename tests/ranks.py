"""Run trainer.main on so many ranks, forked: no torchrun, whose ranks would each import for ten seconds.

    python -m tests.ranks FLAGS.json

FLAGS.json is {world size: [flags of a run, ...]}. The runs of one world size share its processes.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import start_processes

import trainer

def run_rank(rank, world_size, port, runs):
    os.environ.update(RANK=str(rank), WORLD_SIZE=world_size, MASTER_ADDR="localhost", MASTER_PORT=port)
    group = trainer.join_ranks()
    trainer.join_ranks = lambda: group  # a process can join only once: the runs share the group
    for flags in runs:
        trainer.main(trainer.parse_args(flags))
    dist.destroy_process_group()
    trainer.leave(0)


for world_size, runs in json.loads(Path(sys.argv[1]).read_text()).items():
    arguments = world_size, str(get_free_port()), runs
    start_processes(run_rank, arguments, nprocs=int(world_size), start_method="fork")
