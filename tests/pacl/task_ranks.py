"""For test_evaluate_shared.py: runs `pacl evaluate` commands, one after the other, in all that torchrun started.

In one group: joining anew again and again may hang under torchrun. The commands are JSON on the command line.
"""

import json
import sys

import torch
import torch.distributed as dist
from pacl.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for argv in json.loads(sys.argv[1]):
        if status := main(["evaluate", *argv]):
            sys.exit(status)
    dist.destroy_process_group()
