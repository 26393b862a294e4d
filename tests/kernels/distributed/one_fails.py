"""Train in three processes, of which the last does not reach the second step; test_distributed.py starts them."""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from pacl_kernels import fused_pacl_loss

how, exchange, meeting, rank = sys.argv[1:]
# The processes meet in a file: no port can be taken, and a busy machine may start the last process late.
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=3)
group = dist.new_group(timeout=datetime.timedelta(seconds=4))
rank, last = dist.get_rank(), dist.get_world_size() - 1
for step in range(2):
    if step == 1 and rank == last:
        print("leaves", flush=True)
        if how == "dies":
            os._exit(0)
        time.sleep(60)  # the test kills this process earlier
    patches, texts = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    begin = time.monotonic()
    try:
        fused_pacl_loss(patches, texts, 10.0, group=group, exchange=exchange).backward()
    except Exception as error:
        print(f"{type(error).__name__} after {time.monotonic() - begin:.0f} s", flush=True)
        os._exit(3)
print("finished", flush=True)
