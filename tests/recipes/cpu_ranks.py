"""Run a program of open_clip_train on CPUs: `python cpu_ranks.py PROGRAM ...`, one of these for each process.

open_clip_train passes `device_ids` to DDP, which takes them for GPUs alone. Everything else is the program's own.
"""

import runpy
import sys

import torch


def data_parallel(model, device_ids, **options):
    return torch.nn.parallel.distributed.DistributedDataParallel(model, **options)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = data_parallel
    torch.set_num_threads(1)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
