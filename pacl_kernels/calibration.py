"""Time the loss on this machine once, and keep the result in the user's cache folder, for `plan`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from .backends import resolve
from .costs import MIB, Step
from .loss import fused_pacl_loss
from .machines import GPU_STREAMED, Machine, Rates, Timing, fit, traits
from .native import native
from .version import __version__

SHAPES = {"cpu": (128, 196, 512), "cuda": (1024, 196, 512)}  # B = K, N, D: about a second on two cores
TEMPERATURE, SCALE = 0.1, 1 / 0.07
BLOCK = {"cpu": 64 * MIB, "cuda": 256 * MIB}  # memory that is read, to time its bandwidth


def this_machine(kind: str, dtype: str, backend: str = "auto") -> Machine:
    """Return this machine with its rates for one dtype, from the cache or measured now.

    Args:
        kind: "cpu" or "cuda".
        dtype: name of a dtype.
        backend: as in `fused_pacl_loss`.

    Raises:
        ValueError: the backend cannot run here.
    """
    device = torch.device(kind)
    name = resolve(backend, device, getattr(torch, dtype))
    if name == "reference":
        raise ValueError("backend is 'reference', expected another one: the formula keeps all scores and has no plan")
    module = native()
    isa = module.cpu_isa() if module is not None and kind == "cpu" else ""
    cores = torch.get_num_threads() if kind == "cpu" else 1
    model = torch.cuda.get_device_name() if kind == "cuda" else cpu_model()
    key = [__version__, torch.__version__, kind, model, isa, str(cores), name, dtype]
    path = cache_folder() / f"plan-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    rates = read(path)
    if rates is None:
        rates = calibrate(kind, dtype, name, isa)
        with contextlib.suppress(OSError):  # without a place to keep them, they are measured again
            write(path, key, rates)
    source = "measured on this machine"
    threads = f"this machine, {cores} thread{'s' if cores > 1 else ''}" if kind == "cpu" else "this machine"
    label = f"{threads} ({model}{', ' + isa if isa else ''})"
    return Machine(label, kind, source, memory_of(kind), cores, isa, {(name, dtype): rates})


def calibrate(kind: str, dtype: str, backend: str, isa: str) -> Rates:
    """Time a step at one shape and return the rates that explain it, whatever context the caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
        return _calibrate(kind, dtype, backend, isa)


def _calibrate(kind: str, dtype: str, backend: str, isa: str) -> Rates:
    batch, patches, dim = SHAPES[kind]
    step = Step(batch, patches, dim, batch, "dot", dtype, "infonce")
    generator = torch.Generator(kind).manual_seed(0)  # the caller's random numbers stay as they are
    p, t = (
        torch.randn(*shape, device=kind, generator=generator).to(getattr(torch, dtype)).requires_grad_()
        for shape in ((batch, patches, dim), (batch, dim))
    )
    p_rows, t_rows = p.detach().flatten(0, 1), t.detach()
    scores = p_rows @ t_rows.T

    def loss(form: str) -> torch.Tensor:
        return fused_pacl_loss(p, t, SCALE, attn_temperature=TEMPERATURE, form=form, backend=backend)  # type: ignore[arg-type]

    def gradients(value: torch.Tensor) -> None:
        torch.autograd.grad(value, (p, t))

    products = 4 * _milliseconds(lambda: torch.mm(p_rows, t_rows.T, out=scores), kind)
    timing = Timing(
        products,
        _milliseconds(lambda: loss("dot"), kind),
        _milliseconds(lambda: gradients(loss("dot")), kind),
        _milliseconds(lambda: gradients(_eager(p, t)), kind, repeats=2),
    )
    if kind == "cuda":
        cosine = (lambda: loss("cosine")), (lambda: gradients(loss("cosine")))
        timing = timing._replace(cosine_forward=_milliseconds(cosine[0], kind), cosine=_milliseconds(cosine[1], kind))
    return fit(step, traits(backend, isa, step), timing, *_bandwidths(kind))


def _eager(patches: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the loss of the `dot` form in plain PyTorch."""
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    s = torch.einsum("bnd,kd->bkn", p, t)
    logits = SCALE * ((s / TEMPERATURE).softmax(-1) * s).sum(-1).float()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _bandwidths(kind: str) -> tuple[float, float]:
    """Return bytes per second that are read from memory, and that are written to memory that no one has touched."""
    size = BLOCK[kind]
    warm = torch.ones(size // 4, device=kind)
    streamed = size / (_milliseconds(warm.sum, kind) / 1e3)
    if kind == "cuda":
        streamed *= GPU_STREAMED  # a sum is the simplest of all kernels
        return streamed, streamed
    return streamed, size / (_milliseconds(lambda: torch.empty(size, dtype=torch.uint8).fill_(1), kind) / 1e3)


def _milliseconds(run: Callable[[], object], kind: str, repeats: int = 3) -> float:
    """Return the fastest of a few runs after a first one: what else runs on the machine only adds to a time."""
    times = []
    for _ in range(1 + repeats):
        if kind == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:])


def cpu_model() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine if hasattr(os, "uname") else "CPU"


def memory_of(kind: str) -> int | None:
    """Return the bytes of memory of this machine, of its container or of its GPU; None where the system hides it."""
    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    sizes = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" without a limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=None)


def cache_folder() -> Path:
    """Return the folder for measured rates."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pacl_kernels"


def read(path: Path) -> Rates | None:
    """Return the rates in a file, or None if there are none; what another version or a crash left counts as none."""
    try:
        rates = Rates(**json.loads(path.read_text())["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rates if all(isinstance(x, float) and x >= 0 for x in rates) and rates.products > 0 else None


def write(path: Path, key: list[str], rates: Rates) -> None:
    """Write the rates to a file, atomically: processes that start together each leave a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".plan-")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"machine": key, "rates": rates._asdict()}, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
