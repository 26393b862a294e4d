"""Watch a long run of `pacl train`: memory, open files, threads, temporary files, checkpoints and logs must not grow.

    python benchmarks/long_run.py --json F                   # 20,000 small steps, tens of minutes; needs Linux
    python benchmarks/long_run.py --steps 2000 --every 10

An untrained CLIP, two data readers, a validation every 10 and a checkpoint every 5 of the --every steps. The run is
watched from outside, through /proc. Each figure is the median of a fifth of the run; the exit status is 1 if one of
the last fifth exceeds that of the second fifth by more than its allowance. The file has medians of twentieths as well,
and is written every minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from outputs import write_json
from pacl.files import SUFFIX
from report import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/helpers"))
from running import flags
from small_towers import write_world

from pacl_kernels import native

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
KEEP = 3  # checkpoints
# So small that a step is the work around it: the loop, the readers, the log.
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# Each figure may grow by so much, in its own unit. The allocator moves memory a little, and batches under way hold
# files.
ALLOWANCES = {"memory_mib": 24.0, "readers_mib": 24.0, "open_files": 3, "threads": 0, "processes": 0}
ALLOWANCES |= {"temporary_files": 0, "checkpoints": 0, "log_bytes_per_line": 16.0}
Sample = dict[str, float]


def make_world(folder: Path) -> Path:
    """Write what the run reads: a CLIP, shards of scenes, and shards to validate on."""
    return write_world(folder, train=(480, 160), evaluation=(8, 4), sizes=CLIP)


def words(world: Path, logs: Path, steps: int, every: int) -> list[str]:
    """Return the arguments of `pacl`. every: steps between the lines of the log."""
    changes = {"val_data": f"{world}/scenes/eval-{{000..001}}.tar", "batch_size": 4, "workers": 2, "max_steps": steps}
    changes |= {"log_every_n_steps": every, "save_frequency": 5 * every, "val_frequency": 10 * every}
    changes |= {"keep_checkpoints": KEEP, "random_towers": None, "report_to": "tensorboard"}
    return ["train", *flags(world, logs, **changes)]


def watch(
    process: int, run: Path, temporary: Path, ended: Callable[[], bool], interval: float
) -> Iterator[tuple[Sample, float]]:
    """Yield what `process` and its children hold, and the time of the sample in seconds, until it has ended.

    run: folder of the run. temporary: the process's folder of temporary files. interval: seconds between samples.
    """
    begin = time.monotonic()
    while not ended():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it or a child ended just now
            yield look(process, run, temporary), time.monotonic() - begin
        time.sleep(interval)


def look(process: int, run: Path, temporary: Path) -> Sample:
    """Return the figures of a moment; those of the data readers are sums."""
    children = [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    logs = [run / name for name in ("out.log", "metrics.jsonl", "results.jsonl")]  # tensorboard writes by minutes
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().count("\n") if metrics.exists() else 0
    left = [path for path in run.rglob(f"*{SUFFIX}")] + [path for path in temporary.rglob("*") if path.is_file()]
    return {
        "lines": lines,
        "memory_mib": _resident(process),
        "readers_mib": sum(map(_resident, children)),
        "open_files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": len(os.listdir(f"/proc/{process}/task")),
        "processes": len(children),
        "temporary_files": len(left) + len(list(Path("/dev/shm").glob(f"torch_{process}_*"))),
        "checkpoints": len(list((run / "checkpoints").glob("step_*.pt"))),
        "log_bytes_per_line": sum(path.stat().st_size for path in logs if path.exists()) / max(1, lines),
    }


def _resident(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE / 2**20


def medians(samples: list[Sample], count: int = 5) -> list[Sample]:
    """Return the median of each figure in each of `count` equal parts of a run, by the number of lines in its log,
    without its start and its end.
    """
    last = max((sample["lines"] for sample in samples), default=0)
    samples = [sample for sample in samples if 0 < sample["lines"] < last]
    found: list[Sample] = []
    for number in range(count):
        mine = [sample for sample in samples if number <= count * sample["lines"] / (last + 1) < number + 1]
        found.append({name: statistics.median(sample[name] for sample in mine) if mine else 0 for name in ALLOWANCES})
    return found


def growth(parts: list[Sample]) -> list[str]:
    """Return a line for each figure whose last fifth exceeds the second by more than its allowance."""
    wrong = []
    for name, allowance in ALLOWANCES.items():
        before, after = parts[1][name], parts[4][name]
        if after > before + allowance:
            wrong.append(f"{name}: {before:,.1f} in the second fifth of the run, {after:,.1f} in the last")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=50, help="Steps between the lines of the log.")
    parser.add_argument("--interval", type=float, default=0.5, help="Seconds between the samples.")
    parser.add_argument("--json", type=Path, help="File for the result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long_run.") as name:
        folder = Path(name)
        temporary = folder / "temporary"
        temporary.mkdir()
        command = [sys.executable, "-m", "pacl", *words(make_world(folder), folder, options.steps, options.every)]
        with open(folder / "printed", "w") as printed:
            run = subprocess.Popen(
                command, env=os.environ | {"TMPDIR": str(temporary)}, stdout=printed, stderr=subprocess.STDOUT
            )
        ended = lambda: run.poll() is not None  # noqa: E731
        samples: list[Sample] = []
        result = {"machine": machine(torch.device("cpu"), native), "steps": options.steps, "every": options.every}
        for sample, seconds in watch(run.pid, folder / "pacl", temporary, ended, options.interval):
            samples.append(sample)
            result |= {"seconds": round(seconds, 1), "lines": sample["lines"], "samples": len(samples)}
            if options.json and len(samples) % max(1, round(60 / options.interval)) == 0:
                write(options.json, result | {"twentieths": medians(samples, 20)})
        if run.returncode:
            print((folder / "printed").read_text()[-3000:], file=sys.stderr)
            return 1
    parts = medians(samples)
    result |= {"fifths": parts, "growth": growth(parts), "twentieths": medians(samples, 20)}
    for name in ALLOWANCES:
        print(f"{name:<20}" + "".join(f"{part[name]:>12,.1f}" for part in parts))
    print(*result["growth"] or ["nothing grew"], sep="\n")
    if options.json:
        write(options.json, result)
    return int(bool(result["growth"]))


def write(path: Path, result: dict) -> None:
    write_json(path, result)


if __name__ == "__main__":
    sys.exit(main())
