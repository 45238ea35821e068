"""Run as each rank of a job: sample this rank's share of eight images and save them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from random_stage import make_stage

from trainer.sampling import sample

config, out = Path(sys.argv[1]), sys.argv[2]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
seeds = range(8 * rank // world_size, 8 * (rank + 1) // world_size)
torch.save(sample(make_stage(config, respacing="25"), seeds), f"{out}-{rank}.pt")
