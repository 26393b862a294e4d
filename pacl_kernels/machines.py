"""Machines that `plan` knows: times measured at one shape and the rates that follow, or data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

from .costs import CPU_BACKENDS, ITEMSIZE, ONE_TILE, Step, Traits, Work, eager_products, work

GB = 10**9
COSINE_FORWARD = 0.5  # time of a score in the cosine form's further epilogue over that of W, where only `dot` was timed
EAGER_COSINE = 1.45  # time that eager PyTorch takes for a score beside its products, over that of the `dot` form
# Bytes per second of a CPU core: read or written, and written to pages that must be mapped first.
CORE_STREAMED, CORE_FRESH = 6.0 * GB, 2.5 * GB
# Parts of its peak that a CPU core reaches where it was not timed, and seconds that a score takes there.
CORE_PRODUCTS, CORE_LIBRARY, CORE_WEIGHTS, CORE_EAGER = 0.8, 0.6, 2.6e-9, 80e-9
GPU_STREAMED = 0.9  # part of a GPU's memory bandwidth that simple kernels reach
GPU_SINGLE = 0.75  # part of its float32 peak that products of float32 reach, never measured


class Timing(NamedTuple):
    """Milliseconds at one shape, InfoNCE, forward and backward.

    Attributes:
        products: the four bare products of a step in `torch.mm`.
        forward, step: the `dot` form.
        eager: a `dot` step of plain PyTorch.
        cosine_forward, cosine: the `cosine` form; None where `dot` must do.
    """

    products: float
    forward: float
    step: float
    eager: float
    cosine_forward: float | None = None
    cosine: float | None = None


class Rates(NamedTuple):
    """Rates of a backend for one dtype.

    Attributes:
        products: floating-point operations per second.
        softmax, weights, cosine_forward, cosine_weights: seconds for each score, see `costs.Work`.
        streamed, fresh: bytes per second.
        library: floating-point operations per second of `torch.mm`.
        eager: seconds that eager PyTorch takes for each score beside its products.
    """

    products: float
    softmax: float
    weights: float
    cosine_forward: float
    cosine_weights: float
    streamed: float
    fresh: float
    library: float
    eager: float

    def seconds(self, done: Work) -> dict[str, float]:
        """Return the seconds of products, epilogues and traffic."""
        epilogues = self.softmax * done.softmax + self.weights * done.weights
        epilogues += self.cosine_forward * done.cosine_forward + self.cosine_weights * done.cosine_weights
        traffic = done.streamed / self.streamed + done.fresh / self.fresh
        return {"products": done.products / self.products, "epilogues": epilogues, "traffic": traffic}

    def eager_seconds(self, step: Step) -> float:
        share = EAGER_COSINE if step.form == "cosine" else 1.0
        return eager_products(step) / self.library + share * self.eager * step.scores

    def times(self, factor: float) -> Rates:
        """Return the rates of a machine that is `factor` times as fast in everything."""
        rates = {"products", "streamed", "fresh", "library"}
        pairs = zip(self._fields, self, strict=True)
        return Rates(*(value * factor if name in rates else value / factor for name, value in pairs))


class Machine(NamedTuple):
    """Machine with its rates.

    Attributes:
        name: for people.
        kind: "cpu" or "cuda".
        source: where the rates come from, for people.
        memory: bytes; None if unknown.
        cores: of a CPU.
        isa: instruction set of a CPU, as in `PACL_CPU_ISA`.
        rates: by backend and dtype.
    """

    name: str
    kind: str
    source: str
    memory: int | None
    cores: int
    isa: str
    rates: dict[tuple[str, str], Rates]

    def traits(self, step: Step, backend: str) -> Traits:
        return traits(backend, self.isa, step)

    def with_cores(self, cores: int) -> Machine:
        """Return a CPU with so many of its cores, as if its speed grew with their number."""
        rates = {key: value.times(cores / self.cores) for key, value in self.rates.items()}
        scaled = "" if cores == self.cores else f"; scaled from {self.cores} to {cores} cores"
        return self._replace(cores=cores, rates=rates, source=self.source + scaled)


class Sheet(NamedTuple):
    """Data sheet of a GPU: dense operations per second in 16 bits and in float32, bytes per second, bytes."""

    half: float
    single: float
    bandwidth: float
    memory: int


# NVIDIA's data sheets, of the SXM forms where there are several; half of the figures "with sparsity".
SHEETS = {
    "H100": Sheet(989e12, 67e12, 3350 * GB, 80 * GB),
    "H200": Sheet(989e12, 67e12, 4800 * GB, 141 * GB),
    "A100": Sheet(312e12, 19.5e12, 2039 * GB, 80 * GB),
    "L4": Sheet(121e12, 30.3e12, 300 * GB, 24 * GB),
    "B200": Sheet(2250e12, 75e12, 8000 * GB, 180 * GB),
}
# B = K, N and D of the times below, which benchmarks/throughput.py wrote to the files in benchmarks/results.
H100_SHAPE, CPU_SHAPE = (4096, 196, 512), (256, 196, 512)
H100_FILES = ("2026-11-27-h100-bfloat16-dot.json", "2026-11-27-h100-bfloat16-cosine.json")
H100 = {
    "cuda": Timing(18.905, 5.268, 22.031, 180.918, 9.257, 43.794),
    "triton": Timing(18.905, 8.272, 31.196, 180.918, 31.726, 100.749),
}


class Cpu(NamedTuple):
    """Two cores of a CPU, its instruction set, and by dtype the time with the files that it comes from."""

    name: str
    isa: str
    timings: dict[str, tuple[Timing, str]]


# These kernels computed all scores again in the backward. The eager times of the Xeon are those of 2026-11-27.
CPUS = {
    "xeon-amx": Cpu(
        "Xeon with AMX",
        "amx",
        {
            "float32": (Timing(205.331, 49.739, 218.333, 540.614), "2026-11-29-xeon-amx-2cores-float32-dot.json"),
            "bfloat16": (Timing(37.036, 8.159, 51.026, 303.823), "2026-11-29-xeon-amx-2cores-bfloat16-dot.json"),
        },
    ),
    "epyc-zen5": Cpu(
        "EPYC, Zen 5",
        "avx512bf16",
        {
            "float32": (Timing(296.211, 42.028, 184.478, 715.712), "2026-11-23-epyc-zen5-2cores-float32-dot.json"),
            "bfloat16": (Timing(75.202, 21.747, 104.683, 286.137), "2026-11-23-epyc-zen5-2cores-bfloat16-dot.json"),
        },
    ),
    "epyc-zen4": Cpu(
        "EPYC, Zen 4",
        "avx512bf16",
        {
            "float32": (Timing(322.663, 66.301, 293.987, 742.380), "2026-11-24-epyc-zen4-2cores-float32-dot.json"),
            "bfloat16": (Timing(141.527, 34.309, 166.555, 344.971), "2026-11-24-epyc-zen4-2cores-bfloat16-dot.json"),
        },
    ),
    "epyc-avx2": Cpu(
        "EPYC with AVX2",
        "avx2",
        {"float32": (Timing(494.833, 104.569, 432.210, 1241.854), "2026-11-26-epyc-avx2-2cores-float32-dot.json")},
    ),
}
NAMES = (*SHEETS, *CPUS)
CORES = re.compile(r"(\d+)x(\d+(?:\.\d+)?)")


def traits(backend: str, isa: str, step: Step, keeps_scores: bool = True) -> Traits:
    """Return the properties of a backend on a machine. `keeps_scores`: False for kernels older than that."""
    one_pass = step.form != "max" and step.dtype != "float16"
    if backend == "torch":
        return Traits("torch")
    if backend != "cpu":
        fits = step.patches <= 256 and step.form == "dot" if backend == "triton" else step.patches in ONE_TILE
        return Traits(backend, one_pass=one_pass and fits and not (backend == "cuda" and step.dtype == "float32"))
    matrix, pairs = isa == "amx", isa in ("amx", "avx512bf16", "neonbf16")
    if step.dtype == "bfloat16" and pairs:
        speed, attention = (8.0, 3 / 8) if matrix else (2.0, 1.0)
        return Traits("cpu", speed, attention, keeps_scores and not matrix, one_pass)
    return Traits("cpu", keeps_scores=keeps_scores, one_pass=one_pass)


def fit(step: Step, of: Traits, timing: Timing, streamed: float, fresh: float) -> Rates:
    """Return the rates that explain the times of this step, of the `dot` form.

    On a GPU products take the time of the library's, and what remains of a forward is its softmax. On a CPU a forward
    is products alone, because their epilogue is hidden in them. What remains of the backward is W.
    """
    seconds = Timing(*(None if x is None else x / 1e3 for x in timing))  # type: ignore[arg-type]
    library = (3 if step.frozen_texts else 4) * step.unit / seconds.products
    rates = Rates(library, 0.0, 0.0, 0.0, 0.0, streamed, fresh, library, 0.0)
    forward, backward = work(step, of)
    if of.backend in CPU_BACKENDS:
        traffic = rates.seconds(forward)["traffic"]
        rates = rates._replace(products=forward.products / max(seconds.forward - traffic, seconds.forward / 2))
    else:
        rates = rates._replace(softmax=_rest(seconds.forward, rates, forward))
    rates = rates._replace(weights=_rest(seconds.step - seconds.forward, rates, backward))
    if seconds.cosine is not None and seconds.cosine_forward is not None:
        forward, backward = work(step._replace(form="cosine"), of)
        more = _rest(seconds.cosine_forward, rates, forward)
        rates = rates._replace(cosine_forward=more)
        rates = rates._replace(cosine_weights=_rest(seconds.cosine - seconds.cosine_forward, rates, backward))
    else:
        rates = rates._replace(cosine_forward=COSINE_FORWARD * rates.weights, cosine_weights=rates.weights)
    return rates._replace(eager=max(0.0, (seconds.eager - eager_products(step) / library) / step.scores))


def _rest(seconds: float, rates: Rates, done: Work) -> float:
    """Return what remains of the seconds, for each score."""
    return max(0.0, seconds - sum(rates.seconds(done).values())) / max(done.softmax, done.weights)


def named(name: str, dtype: str) -> Machine:
    """Return the machine `name`: a key of `NAMES`, or "8x115" for 8 cores of 115 GFLOP/s in `dtype`.

    Raises ValueError for any other name.
    """
    lower = {key.lower(): key for key in NAMES}
    key = lower.get(name.lower())
    if key in SHEETS:
        return _gpu(key)
    if key in CPUS:
        return _cpu(CPUS[key])
    match = CORES.fullmatch(name)
    if match is None or not int(match[1]) or not float(match[2]):
        raise ValueError(
            f"device is {name!r}, expected cpu, cuda, one of {', '.join(NAMES)}, or cores and their peak in GFLOP/s "
            "such as 8x115"
        )
    return _cores(int(match[1]), float(match[2]) * GB, dtype)


def _cpu(cpu: Cpu) -> Machine:
    b, n, d = CPU_SHAPE
    rates = {}
    for dtype, (timing, _) in cpu.timings.items():
        step = Step(b, n, d, b, "dot", dtype, "infonce")
        of = traits("cpu", cpu.isa, step, keeps_scores=False)
        rates["cpu", dtype] = fit(step, of, timing, 2 * CORE_STREAMED, 2 * CORE_FRESH)
    for dtype in ITEMSIZE:  # computed in float32 where there are no instructions for it
        rates.setdefault(("cpu", dtype), rates["cpu", "float32"])
    source = " and ".join(file for _, file in cpu.timings.values())
    return Machine(f"{cpu.name}, 2 cores", "cpu", f"measured ({source})", None, 2, cpu.isa, rates)


def _cores(cores: int, peak: float, dtype: str) -> Machine:
    rates = Rates(
        CORE_PRODUCTS * peak, 0.0, CORE_WEIGHTS, COSINE_FORWARD * CORE_WEIGHTS, CORE_WEIGHTS,
        CORE_STREAMED, CORE_FRESH, CORE_LIBRARY * peak, CORE_EAGER,
    )  # fmt: skip
    source = "predicted from the peak, with the shares of it that two cores of other machines reached"
    name = f"{cores} cores of {peak / GB:g} GFLOP/s"
    return Machine(name, "cpu", source, None, cores, "avx512bf16", {("cpu", dtype): rates.times(cores)})


def _gpu(name: str) -> Machine:
    """Return a GPU with the rates of the H100, in proportion to the data sheets."""
    b, n, d = H100_SHAPE
    step, own, sheet = Step(b, n, d, b, "dot", "bfloat16", "infonce"), SHEETS["H100"], SHEETS[name]
    rates: dict[tuple[str, str], Rates] = {}
    for backend in ("cuda", "triton") if name in ("H100", "H200") else ("triton",):
        bandwidth = GPU_STREAMED * own.bandwidth
        of_h100 = fit(step, traits(backend, "", step), H100[backend], bandwidth, bandwidth)
        # Epilogues are arithmetic outside of the tensor cores, and stores of W.
        slower = own.single / sheet.single
        streamed = GPU_STREAMED * sheet.bandwidth
        matrices = sheet.half / own.half
        half = of_h100._replace(
            products=of_h100.products * matrices,
            softmax=of_h100.softmax * slower,
            weights=of_h100.weights * slower,
            cosine_forward=of_h100.cosine_forward * slower,
            cosine_weights=of_h100.cosine_weights * slower,
            streamed=streamed,
            fresh=streamed,
            library=of_h100.library * matrices,
            eager=of_h100.eager * own.bandwidth / sheet.bandwidth,
        )
        rates |= {(backend, "bfloat16"): half, (backend, "float16"): half}
        if backend == "triton":
            single = GPU_SINGLE * sheet.single
            rates[backend, "float32"] = half._replace(products=single, library=single, eager=2 * half.eager)
    if name == "H100":
        source = f"bfloat16 measured ({' and '.join(H100_FILES)}), other dtypes predicted"
    else:
        source = "predicted from its data sheet and from times on an H100"
    return Machine(name, "cuda", source, sheet.memory, 1, "", rates)
