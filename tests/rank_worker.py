"""One rank of test_ranks.py: trainer.main itself, once for each set of flags in a file.

    torchrun --nproc_per_node=2 -m tests.rank_worker FLAGS.json
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

import trainer

group = trainer.join_ranks()
trainer.join_ranks = lambda: group  # a process can join only once: the runs share the group
for flags in json.loads(Path(sys.argv[1]).read_text()):
    trainer.main(trainer.parse_args(flags))
dist.destroy_process_group()
trainer.leave(0)
