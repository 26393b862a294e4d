"""Test every backend and instruction set on random problems, by the tolerance of `tests/helpers/accuracy.py`.

    python tests/kernels/fuzz/fuzz.py --seconds 60 --seed 0
    python tests/kernels/fuzz/fuzz.py --backends triton --largest 4096 --form cosine --data huge tiny
    python tests/kernels/fuzz/fuzz.py --case 'B=2 N=5 ... seed=7' --backends cpu --isas avx2

Problem i of a seed is the same on every machine and at any speed. A failure prints the command that repeats it and
makes the exit status 1. Ctrl-C ends the search and prints the summary.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

from accuracy import Expected, Inaccurate, winners
from problems import _DATA, _LAYOUTS, DIFFERENTIABLE, FORMS, OBJECTIVES, Case, Problem, make
from torch import Tensor

from pacl_kernels import available_backends, backends

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64  # only the torch backend takes it
MASKS = ("random", "all", "none", "one", "first", "last")
SIZES = sorted(
    {*range(1, 20), *(n + i for n in (16, 32, 48, 64, 96, 128, 192, 256) for i in (-1, 0, 1)), 37, 53, 101, 197}
)
NEIGHBOURS = 6  # the plain formula also runs on so many neighbours of a problem before an answer counts as wrong


@dataclass(frozen=True)
class Draw:
    """Describe one problem: the arguments of `problems.make`, the threads and the gradients to compute.

    `lists` is the number of texts in each image's list; None: all texts.
    """

    case: Case
    form: str
    objective: str
    dtype: str
    seed: int
    threads: int = 1
    needs: tuple[str, ...] = DIFFERENTIABLE
    lists: int | None = None

    def __str__(self) -> str:
        own = {name: getattr(self, name) for name in ("form", "objective", "dtype", "seed", "threads", "lists")}
        return " ".join(
            f"{name}={value}" for name, value in (vars(self.case) | own | {"needs": ",".join(self.needs)}).items()
        )

    @classmethod
    def parse(cls, text: str) -> Draw:
        """Parse the output of `str`; missing fields take their defaults."""
        values = dict(pair.split("=", 1) for pair in text.split())
        kinds = {"tau": float, "scale": float, "bias": float, "data": str, "mask": str, "layout": str}
        case = {f.name: values.pop(f.name) for f in fields(Case) if f.name in values}
        case = {name: None if x == "None" else kinds.get(name, int)(x) for name, x in case.items()}
        own = {"form": "dot", "objective": "compatibility", "dtype": "float32", "seed": "0", "threads": "1"} | values
        needs = tuple(filter(None, own.pop("needs", ",".join(DIFFERENTIABLE)).split(",")))
        lists = own.pop("lists", "None")
        own |= {name: int(own[name]) for name in ("seed", "threads")}
        return cls(Case(**case), needs=needs, lists=None if lists == "None" else int(lists), **own)

    def problem(self, device: str) -> Problem:
        problem = make(self.case, self.form, self.objective, DTYPES[self.dtype], device, self.seed)
        if self.lists is None:
            return problem
        generator = torch.Generator().manual_seed(self.seed)
        b, own = self.case.B, torch.randint(self.lists, (self.case.B,), generator=generator)
        index = torch.randint(-1, b, (b, self.lists), generator=generator)
        listed = torch.rand(b, generator=generator) < 0.8  # the others are not sure to list their own text
        index[listed, own[listed]] = torch.arange(b)[listed]
        return replace(problem, pairs={"text_index": index.to(device)})


def draw(seed: int, index: int, largest: int = 2**19) -> Draw:
    """Draw problem `index` of `seed`; its arrays have at most `largest` elements."""
    rng = random.Random(f"{seed} {index}")
    objective = rng.choice(OBJECTIVES)
    while True:
        b, n, d, k = (rng.choice(SIZES[: rng.choice((4, 12, 25, len(SIZES)))]) for _ in range(4))
        k = None if objective != "compatibility" else k
        if max(b * n * d, b * (k or b) * max(n, d)) <= largest:
            break
    dtype = rng.choices(list(DTYPES), weights=(4, 4, 2, 1))[0]
    # In float64 the truth rounds like the answer it judges, and a smaller τ magnifies that rounding.
    smallest = 1e-3 if dtype == "float64" else 0.0
    case = Case(
        *(b, n, d, k),
        tau=max(smallest, _temperature(rng)),
        scale=10 ** rng.uniform(-3, math.log10(300)),
        data=rng.choice(list(_DATA)),
        mask=rng.choice((None, None, None, *MASKS)),
        layout=rng.choice(("contiguous", "contiguous", "offset", *_LAYOUTS)),
        bias=rng.choice((None, -0.7, rng.uniform(-10, 10))),
    )
    needs = DIFFERENTIABLE if rng.random() < 0.8 else tuple(name for name in DIFFERENTIABLE if rng.random() < 0.5)
    threads = rng.choice((1, 1, 1, 2, 3))
    one = Draw(case, rng.choice(FORMS), objective, dtype, rng.randrange(2**31), threads, needs)
    # In the truth, made of all pairs, an embedding that is not finite reaches those of no common list. Expanded patches
    # repeat those that the mask of their own image hides.
    finite = case.data not in ("nan", "spoilt") and (case.mask is None or not case.layout.startswith("expanded"))
    if objective == "compatibility" or not finite or rng.random() < 0.7:
        return one
    return replace(one, lists=rng.randint(1, b + 1))


def _temperature(rng: random.Random) -> float:
    """Draw a temperature of any magnitude, more often near the values where implementations switch methods."""
    if rng.random() < 0.3:
        tau = torch.tensor(rng.choice((0.05, 0.5)))
        for _ in range(rng.choice((0, 1, 2))):
            tau = tau.nextafter(torch.tensor(rng.choice((0.0, 1.0))))
        return tau.item()
    return 10 ** rng.choice((rng.uniform(-6, 2), rng.uniform(-2.5, 1)))


@dataclass(frozen=True)
class Target:
    """Name a backend, and the instruction set that it is forced to use."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}/{self.isa}"

    def takes(self, device: str, dtype: str) -> bool:
        if self.backend == "triton" and device == "cpu":  # runs in the interpreter
            return dtype != "float64"
        return backends.get(self.backend).why_not(torch.device(device), DTYPES[dtype]) is None


def targets(backends: Iterable[str], isas: Iterable[str] | None = None) -> list[Target]:
    """Return each given backend with each given instruction set (None: all that this machine has)."""
    found = []
    for backend in backends:
        if (reason := available_backends()[backend]) is not None:
            raise SystemExit(f"backend {backend!r}: {reason}")
        if backend == "cpu":
            from pacl_kernels import _native

            found += [Target(backend, isa) for isa in isas or _native.isas()]
        else:
            found.append(Target(backend))
    return found


@dataclass
class Outcome:
    """Record a target's answer to a problem: the share of the tolerance that it used, and its error if it failed."""

    target: Target
    share: float
    part: str
    error: str | None = None


def try_one(draw: Draw, among: list[Target], device: str = "cpu") -> Iterator[Outcome]:
    """Run the problem on each target of `among` that takes its dtype."""
    problem = draw.problem(device)
    truths: list[tuple[Tensor | None, Expected]] = []
    before = torch.get_num_threads()
    for target in among:
        if not target.takes(device, draw.dtype):
            continue
        os.environ.pop("PACL_CPU_ISA", None)
        if target.isa is not None:
            os.environ["PACL_CPU_ISA"] = target.isa
        torch.set_num_threads(draw.threads)
        shares = {}
        try:
            expected = _expected(problem, draw, target, truths)
            try:
                expected.check(target.backend, shares)
            except Inaccurate:
                expected.ask_neighbours(NEIGHBOURS)
                expected.check(target.backend, shares)
        except Exception as error:  # the search continues after any failure
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            message = " ".join(f"{kind}{error}".split())
            yield Outcome(target, getattr(error, "share", math.inf), message.split(":")[0], message)
        else:
            part = max(shares, key=shares.__getitem__)
            yield Outcome(target, shares[part], part)
        finally:
            torch.set_num_threads(before)
            os.environ.pop("PACL_CPU_ISA", None)


def _expected(problem, draw: Draw, target: Target, truths: list[tuple[Tensor | None, Expected]]) -> Expected:
    """Return the truth, computed once for all targets; for "max" once for all targets with the same winners."""
    index = winners(problem, target.backend) if draw.form == "max" else None
    for other, expected in truths:
        if index is None or torch.equal(index, other):
            return expected
    truths.append((index, Expected(problem, draw.needs, index)))
    return truths[-1][1]


@dataclass
class Summary:
    """Collect counts, and the worst share of the tolerance for each target, dtype and form."""

    problems: int = 0
    tried: int = 0
    failures: int = 0
    seconds: float = 0.0
    worst: dict[tuple[str, str, str], tuple[Outcome, int, int]] = field(default_factory=dict)

    def add(self, draw: Draw, outcome: Outcome) -> None:
        self.tried += 1
        self.failures += outcome.error is not None
        key = (str(outcome.target), draw.dtype, draw.form)
        worst, count, failures = self.worst.get(key, (outcome, 0, 0))
        worst = max(worst, outcome, key=lambda x: x.share)
        self.worst[key] = (worst, count + 1, failures + (outcome.error is not None))

    def __str__(self) -> str:
        rows = [
            f"{'target':<16} {'dtype':<9} {'form':<7} {'tried':>6} {'failed':>6}  worst, as a share of the tolerance"
        ]
        for (target, dtype, form), (worst, count, failures) in sorted(self.worst.items()):
            rows.append(f"{target:<16} {dtype:<9} {form:<7} {count:>6} {failures:>6}  {worst.share:.3g} {worst.part}")
        rate = self.problems / max(self.seconds, 1e-9)
        total = f"{self.problems} problems ({rate:.1f} a second), {self.tried} answers"
        return "\n".join([*rows, f"{total}, {self.failures} outside the tolerance"])


def search(draws: Iterable[Draw], among: list[Target], device: str = "cpu", seconds: float = math.inf) -> Summary:
    """Try problems until the time is up, `draws` ends, or Ctrl-C is pressed; print each failure at once."""
    summary, start = Summary(), time.monotonic()
    try:
        for one in draws:
            if time.monotonic() - start > seconds:
                break
            failed = []
            for outcome in try_one(one, among, device):
                summary.add(one, outcome)
                failed += [outcome] if outcome.error is not None else []
            if failed:
                print(failure(one, failed, device), flush=True)
            summary.problems += 1
    except KeyboardInterrupt:
        pass
    summary.seconds = time.monotonic() - start
    return summary


def failure(draw: Draw, failed: list[Outcome], device: str = "cpu") -> str:
    """Return one line with the failed targets and the worst error, and the command that repeats the problem."""
    backends = " ".join(dict.fromkeys(outcome.target.backend for outcome in failed))
    isas = " ".join(outcome.target.isa for outcome in failed if outcome.target.isa)
    command = f"python tests/kernels/fuzz/fuzz.py --case '{draw}' --backends {backends}"
    command += (f" --isas {isas}" if isas else "") + (f" --device {device}" if device != "cpu" else "")
    worst = max(failed, key=lambda outcome: outcome.share)
    shares = ", ".join(f"{outcome.target} {outcome.share:.3g}" for outcome in failed)
    return f"FAIL {draw.dtype} {draw.form} {draw.case.data}, {shares}: {worst.error}\n  {command}"


def _draws(seed: int, first: int, filters: dict[str, list[str]], largest: int) -> Iterator[Draw]:
    for index in itertools.count(first):
        one = draw(seed, index, largest)
        values = vars(one.case) | vars(one)
        if all(str(values[name]) in wanted for name, wanted in filters.items()):
            yield one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Index of the first problem of the seed.")
    parser.add_argument("--backends", nargs="+", default=["cpu", "torch"])
    parser.add_argument(
        "--isas", nargs="+", help="Instruction sets of the cpu backend; default: all that the machine has."
    )
    parser.add_argument("--device", default="cpu", help="Device: cpu, where triton runs in its interpreter, or cuda.")
    parser.add_argument("--largest", type=int, default=2**19, help="Elements of the largest array.")
    parser.add_argument("--case", help="One problem, as a failure prints it.")
    for name in ("form", "dtype", "data", "objective"):
        parser.add_argument(f"--{name}", nargs="+", help=f"Only problems of such a {name}.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # NumPy raises them in the interpreter
    among = targets(arguments.backends, arguments.isas)
    if arguments.case is not None:
        draws = [Draw.parse(arguments.case)]
    else:
        filters = {
            name: value for name in ("form", "dtype", "data", "objective") if (value := getattr(arguments, name))
        }
        draws = _draws(arguments.seed, arguments.first, filters, arguments.largest)
    summary = search(draws, among, arguments.device, arguments.seconds)
    print(summary)
    return int(summary.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
