"""Run `pacl evaluate` commands one after the other in all processes of a group, for test_evaluate_shared.py.

All run in one group, because joining a new group many times may hang under torchrun. The command line gives the
commands as JSON.
"""

import json
import sys

import torch
import torch.distributed as dist
from pacl.cli import main
from pacl.processes import gather_rows

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = gather_rows(torch.full((2 * rank, 3 if rank else 0), float(rank)), dist.group.WORLD)
    assert rows.tolist() == [[float(i)] * 3 for i in range(world) for _ in range(2 * i)]
    assert gather_rows(torch.empty(0, 1), dist.group.WORLD).shape == (0, 1)
    for argv in json.loads(sys.argv[1]):
        if status := main(["evaluate", *argv]):
            sys.exit(status)
    dist.destroy_process_group()
