"""Predict memory and time of a step of the loss, and the largest batch that fits, without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from . import calibration, costs, machines
from .checks import FORMS, LOSSES, BackendName, Form, Loss, check_choice
from .costs import Step, Traits
from .machines import Machine

GIB = 2**30
LARGEST = 2**26  # batches from here on are not tried
# Assumed between processes, not measured: bytes per second and seconds of a hop, on GPUs and with Gloo on one machine.
LINKS = {"cuda": (50e9, 10e-6), "cpu": (0.5e9, 100e-6)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Prediction for a step (forward and backward) of the loss in one process; `str()` gives a readable table.

    Attributes:
        batch: images of this process, B.
        patches: patches of an image, N.
        dim: dimensions, D.
        texts: texts of all processes, K.
        form: form of φ.
        dtype: name of the dtype.
        loss: the loss.
        world_size: processes that share the batch.
        frozen_texts: True if the texts need no gradient.
        machine: name of the machine.
        source: where its rates come from: files of measurements, this machine, or a data sheet.
        backend: backend that runs.
        memory: bytes at the peak by part. "patches and texts" and "their gradients" are the caller's.
        peak: bytes at the peak, the sum of the parts.
        kernels: seconds of "products" (of matrices), "epilogues" (exponentials, and weights W made of scores),
            "traffic" (bytes that are moved beside those) and "exchange" (among processes).
        seconds: seconds of the step, the sum of the kernels.
        capacity: bytes of memory of the machine, None if unknown.
        largest_batch: largest B that fits into `capacity`, 0 if none does, None if `capacity` is None. Without `texts`,
            K grows with it.
        eager_memory: bytes at the peak of the same step in plain PyTorch, in one process with all texts.
        eager_seconds: seconds of it.
        eager_largest_batch: largest batch of it.
    """

    batch: int
    patches: int
    dim: int
    texts: int
    form: Form
    dtype: str
    loss: Loss
    world_size: int
    frozen_texts: bool
    machine: str
    source: str
    backend: str
    memory: Mapping[str, int]
    peak: int
    kernels: Mapping[str, float]
    seconds: float
    capacity: int | None
    largest_batch: int | None
    eager_memory: int
    eager_seconds: float
    eager_largest_batch: int | None

    def __str__(self) -> str:
        processes = f", {self.world_size:,} processes" if self.world_size > 1 else ""
        frozen = ", frozen texts" if self.frozen_texts else ""
        rows = [
            ("", f"backend {self.backend}", "plain PyTorch"),
            ("seconds of a step", _seconds(self.seconds), _seconds(self.eager_seconds)),
            *((f"  {name}", _seconds(x), "") for name, x in self.kernels.items() if x),
            ("peak memory", size(self.peak), size(self.eager_memory)),
            *((f"  {name}", size(x), "") for name, x in self.memory.items() if x),
        ]
        if self.capacity is not None and self.largest_batch is not None and self.eager_largest_batch is not None:
            largest = f"{self.largest_batch:,}", f"{self.eager_largest_batch:,}"
            rows.append((f"largest batch in {size(self.capacity)}", *largest))
        width = max(len(row[0]) for row in rows)
        return "\n".join(
            [
                f"{self.form}, {self.loss}, {self.dtype}: B = {self.batch:,}, K = {self.texts:,}, "
                f"N = {self.patches:,}, D = {self.dim:,}{processes}{frozen}",
                f"{self.machine}: {self.source}",
                *(f"{name:<{width}}  {ours:>14}  {eager:>14}".rstrip() for name, ours, eager in rows),
            ]
        )


def plan(
    batch: int,
    patches: int,
    dim: int,
    texts: int | None = None,
    *,
    form: Form = "dot",
    dtype: str | torch.dtype = "float32",
    loss: Loss = "infonce",
    device: str | torch.device | None = None,
    world_size: int = 1,
    frozen_texts: bool = False,
    masked: bool = False,
    backend: BackendName = "auto",
    threads: int | None = None,
    memory: int | None = None,
) -> Plan:
    """Predict memory and time of a step of `fused_pacl_loss`, and the largest batch that fits.

    Nothing is allocated on the device, and a named machine needs no GPU here. Memory is counted; time is a model whose
    rates come from one shape on each machine. docs/performance.md says how far it was off on other shapes.

    Args:
        batch: images of this process, B.
        patches: patches of an image, N.
        dim: dimensions, D.
        texts: texts of this process; by default as many as images.
        form: as in `fused_pacl_loss`.
        dtype: float32, bfloat16 or float16.
        loss: as in `fused_pacl_loss`.
        device: `"cpu"` or `"cuda"` for this machine, by default its GPU if it has one. The first plan for it and a
            dtype takes about a second to time a step; the rates are kept in the user's cache folder. Or the name of a
            machine: H100, H200, A100, L4, B200, xeon-amx, epyc-zen5, epyc-zen4, epyc-avx2; or cores of a CPU and the
            peak of one in this dtype in GFLOP/s, `"8x115"`.
        world_size: processes that share the batch, each with `batch` images and `texts` texts.
        frozen_texts: the texts need no gradient.
        masked: there is a `patch_mask`, all of whose patches are real.
        backend: as in `fused_pacl_loss`; by default the one that runs on the machine.
        threads: cores of a CPU to use; by default those of the machine, here `torch.get_num_threads()`. Speed is taken
            to grow with their number, which was not measured beyond two.
        memory: bytes that the step may take, by default the machine's.

    Returns:
        A `Plan`.

    Raises:
        TypeError, ValueError: an argument is not as described above.
    """
    for name, value in (("batch", batch), ("patches", patches), ("dim", dim), ("world_size", world_size)):
        _check_count(name, value)
    for name, given in (("texts", texts), ("threads", threads), ("memory", memory)):
        if given is not None:
            _check_count(name, given)
    check_choice("form", form, FORMS)
    check_choice("loss", loss, LOSSES)
    dtype = str(dtype).removeprefix("torch.")
    check_choice("dtype", dtype, tuple(costs.ITEMSIZE))
    machine = _machine(device, dtype, backend)
    if threads is not None:
        if machine.kind != "cpu":
            raise ValueError(f"threads is {threads} and the device is {machine.name}, expected no threads for a GPU")
        machine = machine.with_cores(threads)
    backends = [name for name, of in machine.rates if of == dtype]
    if backend == "auto":
        backend = backends[0]  # type: ignore[assignment]
    elif backend not in backends:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(['auto', *backends])} for {machine.name}")

    def of_batch(count: int) -> Step:
        own = count if texts is None else texts
        return Step(count, patches, dim, own * world_size, form, dtype, loss, frozen_texts, masked, world_size)

    step = of_batch(batch)
    traits = machine.traits(step, backend)
    parts = costs.memory(step, traits, machine.cores)
    kernels = seconds_of(step, traits, machine)
    capacity = machine.memory if memory is None else memory
    on_cpu = machine.kind == "cpu"
    return Plan(
        batch, patches, dim, step.texts, form, dtype, loss, world_size, frozen_texts,
        machine=machine.name,
        source=machine.source,
        backend=backend,
        memory=parts,
        peak=sum(parts.values()),
        kernels=kernels,
        seconds=sum(kernels.values()),
        capacity=capacity,
        largest_batch=_largest(lambda b: sum(costs.memory(of_batch(b), traits, machine.cores).values()), capacity),
        eager_memory=costs.eager_memory(step, on_cpu),
        eager_seconds=machine.rates[backend, dtype].eager_seconds(step),
        eager_largest_batch=_largest(lambda b: costs.eager_memory(of_batch(b), on_cpu), capacity),
    )  # fmt: skip


def seconds_of(step: Step, traits: Traits, machine: Machine) -> dict[str, float]:
    """Return the seconds of a step by kernel."""
    kernels_of = traits.backend
    if kernels_of == "cuda" and costs.are_tritons(step) and ("triton", step.dtype) in machine.rates:
        kernels_of = "triton"
    pooled = costs.pools(step, traits) and ("cpu", "float32") in machine.rates  # whose products are in float32
    rates = machine.rates[kernels_of, "float32" if pooled else step.dtype]
    forward, backward = costs.work(step, traits)
    kernels = rates.seconds(forward.plus(backward))
    bandwidth, latency = LINKS[machine.kind]
    sent = costs.sent_bytes(step, scatters=machine.kind == "cuda") if step.world_size > 1 else 0.0
    return kernels | {"exchange": sent / bandwidth + costs.hops(step) * latency}


def _machine(device: str | torch.device | None, dtype: str, backend: str) -> Machine:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(device)
    if name == "cuda" or name.startswith("cuda:"):
        if not torch.cuda.is_available():
            raise ValueError(
                f"device is {name!r}, expected cpu or the name of a machine such as H100: torch finds no GPU here"
            )
        return calibration.this_machine("cuda", dtype, backend)
    return calibration.this_machine("cpu", dtype, backend) if name == "cpu" else machines.named(name, dtype)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def _largest(memory: Callable[[int], int], capacity: int | None) -> int | None:
    """Return the largest batch whose memory is within the capacity."""
    if capacity is None:
        return None
    low, high = 0, 1  # low fits, high does not
    while high < LARGEST and memory(high) <= capacity:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle) <= capacity else (low, middle)
    return low


def size(count: int) -> str:
    """Return bytes for people."""
    for unit, name in ((2**40, "TiB"), (GIB, "GiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**20:.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
