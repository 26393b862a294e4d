"""Measure the cost of a batch over many processes with Gloo on this machine, and model it for H200s.

    python benchmarks/distributed.py                       # 1 to 4 processes, a few minutes on two cores
    python benchmarks/distributed.py --json result.json
    python benchmarks/distributed.py --show result.json    # print the tables of such a file
    python benchmarks/distributed.py --model-only          # print the model's table alone

The providers are the two exchanges of `fused_pacl_loss(group=)`, the same loss with all patches gathered (as ClipLoss
gathers its features), and open_clip's ClipLoss on pooled features. "sent" is the count of the loopback device.
"formula" is the traffic of ring algorithms: per process, all-gather and reduce-scatter of x bytes over W processes send
(W - 1) x / W, and all-reduce twice that. "without" is the time of the same step with every collective replaced by local
copies, in all processes at once, so that they compete for the cores in the same way. "model" is the H200 model's
formula with the bandwidth and latency of all-gathers in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import result_tables as tables
import torch
import torch.distributed as dist
import torch.distributed.nn
from throughput import peak_growth
from torch.nn import functional as F

from pacl_kernels import distributed, fused_pacl_loss

SCALE = 1 / 0.07
HEADER = 23 * 8  # bytes that each process sends to describe itself
# Assumptions of the model; none is measured on such a machine.
H200 = {"flops": 450e12, "link_bytes": 50e9, "latency": 10e-6}  # bf16 products of the loss; 400 Gb/s; one hop


def step_gather(patches, texts):
    return fused_pacl_loss(patches, texts, SCALE, group=dist.group.WORLD, exchange="gather")


def step_ring(patches, texts):
    return fused_pacl_loss(patches, texts, SCALE, group=dist.group.WORLD, exchange="ring")


def step_patches(patches, texts):
    """Gather all patches and texts in every process, with gradients, and compute the whole batch there."""
    if dist.get_world_size() > 1:
        patches, texts = (torch.cat(torch.distributed.nn.all_gather(x)) for x in (patches, texts))
    return fused_pacl_loss(patches, texts, SCALE, group="local")


def step_clip_loss(patches, texts):
    from open_clip import ClipLoss

    world, rank = dist.get_world_size(), dist.get_rank()
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return loss(F.normalize(patches.mean(1), dim=-1), F.normalize(texts, dim=-1), torch.tensor(SCALE))


STEPS = {"gather": step_gather, "ring": step_ring, "all patches": step_patches, "ClipLoss, pooled": step_clip_loss}


def formula(provider: str, world: int, batch: int, patches: int, dim: int, size: int, scatters: bool) -> float:
    """Return the bytes that one process sends in a step.

    Gradients of texts are float32, and take twice the bytes if the group cannot reduce-scatter (`scatters`).
    """
    texts, others, gradient = batch * dim * size, world - 1, batch * dim * 4
    sums = 2 * others / world * 8 * (world * batch + 2) + HEADER * others
    if provider == "gather":
        return others * (texts + gradient * (1 if scatters else 2)) + sums
    if provider == "ring":
        return 2 * others * texts + (world * gradient if others else 0) + sums
    if provider == "all patches":
        return 2 * others * (patches + 1) * texts
    return 2 * others * 2 * texts


# One process


def worker(args) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # ClipLoss's collectives
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(rank)
    dtype = getattr(torch, args.dtype)
    patches = torch.randn(args.batch, args.patches, args.dim, generator=generator).to(dtype).requires_grad_()
    texts = torch.randn(args.batch, args.dim, generator=generator).to(dtype).requires_grad_()
    rows = {}
    for name, step in STEPS.items():
        run = lambda step=step: torch.autograd.grad(step(patches, texts), (patches, texts))  # noqa: E731
        run()
        before = _sent_on_loopback()
        times = [_time(run) for _ in range(args.repeats)]
        sent = (_sent_on_loopback() - before) / args.repeats / world
        rows[name] = {"sent": sent, "ms": times, "memory": _memory(run, patches, texts)}
        if name in ("gather", "ring"):
            with no_communication():
                run()
                rows[name]["ms_without"] = [_time(run) for _ in range(args.repeats)]
    measured_link = link()
    for name in ("gather", "ring"):
        size = formula(name, world, args.batch, args.patches, args.dim, texts.element_size(), scatters=False)
        rows[name]["ms_model"] = 1e3 * communication(size, world, name == "ring", measured_link) if world > 1 else 0.0
        rows[name]["link"] = measured_link
    everyone = [None] * world
    dist.all_gather_object(everyone, rows)
    if rank == 0:
        for name, row in rows.items():
            for key in ("ms", "ms_without"):
                if key in row:  # a step lasts until the last process has finished
                    row[key] = statistics.median(map(max, zip(*(other[name][key] for other in everyone), strict=True)))
            row["memory"] = max(other[name]["memory"] for other in everyone)
        Path(args.worker).write_text(json.dumps(rows))
    dist.destroy_process_group()


def link() -> dict[str, float]:
    """Measure bytes per second and seconds per hop of this group, by all-gathers of 8 bytes and of 1 MiB."""
    world, times = dist.get_world_size(), []
    for size in (2, 2**18):
        x, out = torch.ones(size), torch.empty(world * size)
        times.append(
            statistics.median(_time(lambda x=x, out=out: dist.all_gather_into_tensor(out, x)) for _ in range(9))
        )
    others = max(1, world - 1)
    return {"link_bytes": others * 2**20 / max(1e-6, 1e-3 * (times[1] - times[0])), "latency": 1e-3 * times[0] / others}


def communication(sent: float, world: int, ring: bool, link: dict[str, float]) -> float:
    """Return the seconds to send `sent` bytes in the hops of an exchange, without overlap with computation."""
    hops = (3 if ring else 2) * (world - 1) + 2 * math.ceil(math.log2(world))
    return sent / link["link_bytes"] + hops * link["latency"]


def no_communication():
    """Replace collectives by local copies with the same shapes."""

    def all_gather(x, world, group):
        return x.repeat(world, *[1] * (x.ndim - 1))

    def reduce_scatter(x, plan):
        return x[plan.columns(plan.rank)].clone()

    return mock.patch.multiple(
        distributed.collectives,
        all_gather=all_gather,
        all_reduce=lambda x, plan: x.clone(),
        reduce_scatter=reduce_scatter,
        hop=lambda x, plan: x.clone(),
        wait=lambda x: x,
    )


def _time(run) -> float:
    dist.barrier()
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _sent_on_loopback() -> int:
    dist.barrier()
    fields = re.search(r"^\s*lo:(.*)$", Path("/proc/net/dev").read_text(), re.MULTILINE)[1].split()
    dist.barrier()
    return int(fields[8])


def _memory(run, patches, texts) -> float:
    """Return the peak memory of a step beyond inputs and gradients, in MiB."""
    gradients = sum(x.numel() * x.element_size() for x in (patches, texts))
    return max(0, peak_growth(run) - gradients) / 2**20


# All of them


def measure(args) -> list[dict]:
    rows = []
    for world in args.processes:
        with tempfile.NamedTemporaryFile() as file:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={world}",
                __file__,
            ]
            options = [f"--{name}={getattr(args, name)}" for name in ("batch", "patches", "dim", "dtype", "repeats")]
            subprocess.run(
                [*command, *options, f"--worker={file.name}"], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
            )
            measured = json.loads(Path(file.name).read_text())
        size = getattr(torch, args.dtype).itemsize
        for name, row in measured.items():
            sent = formula(name, world, args.batch, args.patches, args.dim, size, scatters=False)
            rows.append({"processes": world, "what": name, **row, "formula": sent})
    return rows


def model(patches: int = 196, dim: int = 512, size: int = 2) -> list[dict]:
    """Model the seconds of a step of the loss on H200s: its products plus its communication, without overlap."""
    rows = []
    for batch in (2**15, 2**17, 2**20):
        for world in (8, 64, 256, 1024):
            local = batch // world
            arrays = distributed.gathered_bytes(world, local, dim, size)
            ring = arrays > distributed.GATHER_BYTES
            sent = formula("ring" if ring else "gather", world, local, patches, dim, size, scatters=True)
            compute = (5 if ring else 4) * 2 * local * patches * batch * dim / H200["flops"]
            rows.append(
                {
                    "batch": batch,
                    "gpus": world,
                    "exchange": "ring" if ring else "gather",
                    "sent": sent,
                    "patches_sent": formula("all patches", world, local, patches, dim, size, scatters=True),
                    "communication": communication(sent, world, ring, H200),
                    "compute": compute,
                    "arrays": 4 * local * dim * (2 + size) + min(16 * local**2, distributed.RING_BYTES)
                    if ring
                    else arrays,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N", help="Numbers of processes to measure.")
    add("--batch", type=int, default=64, help="Batch of each process (default: %(default)s).")
    add("--patches", type=int, default=196, help="Patches per image.")
    add("--dim", type=int, default=512, help="Dimension of the embeddings.")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="Dtype of the embeddings.")
    add("--repeats", type=int, default=7, help="Timed steps of each provider.")
    add("--json", metavar="FILE", help="Write the result.")
    add("--show", metavar="FILE", help="Print the tables of an earlier --json.")
    add("--model-only", action="store_true", help="Print the model's table without measuring.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.show:
        result = json.loads(Path(args.show).read_text())
        print(tables.distributed(result), tables.distributed_model(result), sep="\n\n")
        return
    from report import machine

    result = {"machine": machine(torch.device("cpu"), None), "settings": vars(args), "model": model(), "assumed": H200}
    if not args.model_only:
        result["rows"] = measure(args)
        print(tables.distributed(result), end="\n\n")
    print(tables.distributed_model(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
