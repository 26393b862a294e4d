"""Measure time, memory and accuracy of the fused loss and of its alternatives, on this machine, in one run.

    python benchmarks/throughput.py                             # under two minutes, B = K = 256, N = 196, D = 512
    python benchmarks/throughput.py --form cosine --dtype bfloat16 --json result.json --plot result.svg

`--help` lists all options; `peers.py` is the list of what is compared, `counts.py` counts the work of a step.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import logging
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import report
import torch
from counts import machine_peak, operations, unit, units
from options import AVX2, parse, set_error_batch
from peers import LOGIT_SCALE, PEERS, chunked, is_compiled, kind_of, logit_bias, versions
from providers import PRODUCTS, does_not_fit, losses, products, why_not

from pacl_kernels import backends, reference
from pacl_kernels.native import native

SECONDS = 3.0  # timed runs of a provider: a slow one runs less often than --repeats, but at least 3 times
SLOW = 10.0  # seconds: slower providers are warmed up only by the run at that smaller batch
# On a machine without a GPU, torch.compile would warn about it three times.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def make_inputs(args, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random patches and texts; random directions cost the same as real ones.

    They are drawn on the device: for a GPU-sized batch the CPU's generator takes seconds, again for every provider.
    """
    device = args.torch_device
    generator = torch.Generator(device).manual_seed(args.seed)
    patches = torch.randn(batch, args.patches, args.dim, generator=generator, device=device).to(args.torch_dtype)
    texts = torch.randn(batch, args.dim, generator=generator, device=device).to(args.torch_dtype)
    return patches.requires_grad_(), texts.requires_grad_(not args.frozen_texts)


class Clock:
    """Clock of milliseconds between marks.

    A GPU first gets a pause, so that launches are queued before the first mark, and a sweep of its cache, because a
    training step does not find its patches there either.
    """

    def __init__(self, device: torch.device):
        self.sweep = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def start(self) -> None:
        self.marks = []
        if self.sweep is not None:
            self.sweep.zero_()
            torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
        self.mark()

    def mark(self) -> None:
        if self.sweep is None:
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def read(self) -> list[float]:
        first, *others = self.marks
        if self.sweep is None:
            return [1e3 * (mark - first) for mark in others]
        torch.cuda.synchronize()
        return [first.elapsed_time(mark) for mark in others]


def step(loss, inputs, clock: Clock) -> list[torch.Tensor]:
    """Return loss and gradients. The forward pass is that of a training step: it keeps what the backward pass needs.

    A peer that has no backward gives a loss without a graph; it returns the loss alone.
    """
    clock.start()
    value = loss(*inputs)
    clock.mark()
    if not value.requires_grad:
        return [value]
    gradients = torch.autograd.grad(value, [x for x in inputs if x.requires_grad])
    clock.mark()
    return [value.detach(), *gradients]


def warm_up(args, run, small_run, clock: Clock, compiled: bool = False):
    """Load code, start threads and compile (again for each shape); return the result of the small run."""
    result = small_run()
    seconds = 1e-3 * clock.read()[-1] * (args.batch / args.error_batch) ** 2  # estimate for `run`
    if args.error_batch < args.batch and (compiled or seconds < SLOW):
        run()
    return result


def extra_memory(args, name: str) -> float:
    """Return the peak memory of a step beyond inputs and gradients, in MiB; on a CPU, the growth of this process."""
    loss, inputs, clock = losses(args, name)[name], make_inputs(args, args.batch), Clock(args.torch_device)
    gradients = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad and kind_of(name) != "forward")
    run, small = functools.partial(step, loss, inputs, clock), make_inputs(args, args.error_batch)
    warm_up(args, run, functools.partial(step, loss, small, clock), clock, is_compiled(name))
    if args.torch_device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        growth = torch.cuda.max_memory_allocated() - before
    else:
        growth = peak_growth(run)
    return max(0, growth - gradients) / 2**20


def peak_growth(run) -> int:
    """Return the peak growth of this process's memory during `run()`, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _memory_process(args, name: str, pipe) -> None:
    os.environ["MKL_DISABLE_FAST_MM"] = "1"  # otherwise MKL keeps its buffers, and the second step does not show them
    torch.set_num_threads(args.threads)
    pipe.send(_attempt(extra_memory, args, name))


def measure_memory(args, name: str) -> tuple[float | None, str | None]:
    """Return (MiB, None), or (None, why it fails), or (None, None) if the system does not report memory."""
    if args.torch_device.type == "cuda":
        return _attempt(extra_memory, args, name)
    if not os.path.exists("/proc/self/clear_refs"):
        return None, None
    context = multiprocessing.get_context("forkserver")  # forks from a process that has only loaded torch
    context.set_forkserver_preload(["torch"])  # not pacl_kernels, which it could import from the working folder
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory_process, args=(args, name, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return None, f"its process died with exit code {process.exitcode} (-9 usually means out of memory)"


def _attempt(function, *arguments) -> tuple:
    """Return (result, None), or (None, the error in one line): a failing provider gets a row of the table too."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:110]


def float64_truth(args, inputs, clock: Clock) -> list[torch.Tensor]:
    def phi(patches, texts, temperature, form):
        return reference.compatibility(patches, texts, attn_temperature=temperature, form=form)

    def loss(patches, texts):
        logits = LOGIT_SCALE * chunked(patches, texts, args.temperature, args.form, phi) + logit_bias(args.loss)
        return reference.contrastive_loss(logits, args.loss)

    return step(loss, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], clock)


def relative_error(results, truth) -> float:
    """Return the largest error of loss and gradients; in the max form, rounding may swap a pair's two best patches."""
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(results, truth, strict=False))


def measure(args) -> Iterator[dict]:
    """Yield the result after each round of timed runs, for --json, so that an interrupted run keeps its last result."""
    functions, clock, machine = losses(args), Clock(args.torch_device), report.machine(args.torch_device, native())
    rows = {name: {"reason": why_not(name, args)} for name in functions} | {PRODUCTS: {"reason": None}}
    for name in functions:
        if rows[name]["reason"] is None:
            _note(f"memory of {name}")
            rows[name]["extra_memory_mib"], rows[name]["reason"] = measure_memory(args, name)

    # Accuracy, and a warm-up
    inputs = make_inputs(args, args.batch)
    small = inputs if args.error_batch == args.batch else make_inputs(args, args.error_batch)
    able = {name: loss for name, loss in functions.items() if rows[name]["reason"] is None}

    def runs_with(tensors) -> dict:
        steps = {name: functools.partial(step, loss, tensors, clock) for name, loss in able.items()}
        return {PRODUCTS: products(tensors, clock, args.form)} | steps

    runs, small_runs = runs_with(inputs), runs_with(small)
    _note("float64 truth")
    truth = float64_truth(args, small, clock)
    for name in list(runs):
        _note(f"warm-up of {name}")
        results, rows[name]["reason"] = _attempt(warm_up, args, runs[name], small_runs[name], clock, is_compiled(name))
        if rows[name]["reason"] is not None:
            del runs[name]
        elif name != PRODUCTS and kind_of(name) != "floor":
            rows[name]["relative_error"] = relative_error(results, truth)
        del results
    del truth, small, small_runs

    # Every round runs each provider at most once, and starts with a different one.
    order, samples, peaks, counts = list(runs), {name: [] for name in runs}, [], {}
    for turn in range(args.repeats):
        _note(f"timed round {turn + 1} of {args.repeats}")
        peaks.append(machine_peak(args))
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            count = counts.get(name, args.repeats)
            if turn * count // args.repeats < (turn + 1) * count // args.repeats:
                runs[name]()
                samples[name].append(clock.read())
                if name not in counts:
                    counts[name] = min(args.repeats, max(3, int(1e3 * SECONDS / samples[name][0][-1])))
        yield result(machine, rows, samples, peaks, args)
    _note("")
    if args.profile:
        write_profile(args, runs)


def result(machine: dict, rows: dict, samples: dict, peaks: list, args) -> dict:
    rows = {name: dict(row) for name, row in rows.items()}
    for name, pairs in samples.items():
        rows[name]["runs"] = len(pairs)
        for part, values in zip(("forward", "step"), zip(*pairs, strict=True), strict=False):
            rows[name][f"{part}_ms"], rows[name][f"{part}_spread"] = statistics.median(values), _p20_p80(values)
    peak = None if None in peaks else statistics.median(peaks)
    return {
        "machine": machine,
        "versions": versions(),
        "settings": {key: value for key, value in vars(args).items() if not key.startswith("torch_")},
        "unit": unit(args),
        "units": units(args),
        "operations": operations(args),
        "peak": peak,
        "peak_spread": peak and _p20_p80(peaks),
        "rows": complete(rows, peak, args),
    }


def complete(rows: dict, peak: float | None, args) -> list[dict]:
    """Return the rows with their ratios; missing values are None."""
    same = [row for name, row in rows.items() if name in PEERS and kind_of(name) == "loss"]
    best_peer = min((row["step_ms"] for row in same if "step_ms" in row), default=None)
    full = []
    for name, row in rows.items():
        of_products = {"forward": 1, "step": 1 if args.form == "max" else 3 if args.frozen_texts else 4}
        count = operations(args) if name != PRODUCTS else of_products
        new = {"name": name}
        for part in ("forward", "step"):
            ms = row.get(f"{part}_ms")
            new[f"{part}_ms"], new[f"{part}_spread"] = ms, row.get(f"{part}_spread")
            new[f"{part}_vs_products"] = ms and ms / rows[PRODUCTS][f"{part}_ms"]
            same_work = peak and kind_of(name) != "floor"
            new[f"{part}_share_of_peak"] = ms and 1e3 * count[part] * unit(args) / ms / peak if same_work else None
        same_loss = best_peer and kind_of(name) == "loss"
        new["step_vs_best_peer"] = new["step_ms"] and best_peer / new["step_ms"] if same_loss else None
        full.append(new | {key: row.get(key) for key in ("extra_memory_mib", "relative_error", "runs", "reason")})
    return full


def missing(outcome: dict, args) -> list[str]:
    """Return a sentence for each missing row of the fused loss, except `cuda` on other GPUs if another backend ran."""
    fused = {name: row for row in outcome["rows"] if (name := row["name"].removeprefix("fused ")) != row["name"]}
    lost = {name: row["reason"] for name, row in fused.items() if row["reason"] is not None}
    if len(lost) < len(fused) and backends.get("cuda").why_not(args.torch_device, args.torch_dtype) is not None:
        lost.pop("cuda", None)
    return [f"the row of fused {name} is missing: {reason}" for name, reason in lost.items()]


def _p20_p80(values) -> list[float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values)
    return [fifths[0], fifths[-1]]


def write_profile(args, runs: dict) -> None:
    """Write a trace of one step of every provider, for ui.perfetto.dev or chrome://tracing."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.torch_device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        for name, run in runs.items():
            with torch.profiler.record_function(name):
                run()
    trace.export_chrome_trace(args.profile)


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.avx2 and not AVX2.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    torch.set_num_threads(arguments.threads)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # of maxsim-cpu, which is not loaded yet
    if arguments.sweep:
        import sweep

        try:
            found = sweep.run(arguments, measure, set_error_batch)
        except ValueError as error:
            sys.exit(f"--sweep: {error}")
        if arguments.plot:
            print(*sweep.plot(found, arguments.plot, arguments), sep="\n")
        return
    if reason := does_not_fit(2, arguments):
        sys.exit(f"patches and their gradient do not fit in memory at these sizes: {reason}")
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(arguments.dtype)
    if arguments.device == "cpu" and half and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", bool)():
        print(f"torch has no fast {arguments.dtype} products here; --peers none skips the peers", file=sys.stderr)
    for outcome in measure(arguments):
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(outcome, indent=1) + "\n")
    print(report.table(outcome))
    if arguments.plot:
        report.plot(outcome, arguments.plot)
    if lost := missing(outcome, arguments):
        sys.exit("\n".join(lost))


if __name__ == "__main__":
    main()
