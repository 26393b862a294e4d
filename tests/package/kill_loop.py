"""Kill `pacl train`, `features` and `data pack` at random moments, resume them until they end, and compare.

    python tests/package/kill_loop.py --kills 50 --seed 0
    python tests/package/kill_loop.py --kills 20 --commands train

Every round begins a command in a new folder, kills it up to four times with kill -9, and lets the same command (with
`--resume latest` for train) finish. Then files, bits and validations must be those of a run that was never killed. A
difference is printed with its folder, which stays, and makes the exit status 1. `shared` is `features` in two or three
processes, of which one is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from dies import fork_pacl, fork_ranks
from forks import status
from pacl.training.checkpoints import checkpoints, load_checkpoint
from running import assert_same_state, flags, lines
from small_towers import write_world

COMMANDS = ("train", "features", "shared", "pack")
MOST = 4  # kills of one round
STEPS, VALIDATIONS = 8, 3  # steps of a run of `pacl train`, and steps between its validations


@dataclass
class Figures:
    """Counts of one command. early: kills after which the command had left no file to go on from."""

    command: str
    rounds: int = 0
    kills: int = 0
    early: int = 0

    def __str__(self) -> str:
        return f"{self.command}: {self.kills} kills in {self.rounds} rounds, {self.early} of them before the first file"


def make_world(folder: Path) -> Path:
    """Write what the commands read: a CLIP and shards of scenes."""
    return write_world(folder, train=(120, 40), evaluation=(24, 12))


def words(command: str, world: Path, out: Path) -> list[str]:
    source, clip = f"{world}/scenes/train-{{000..002}}.tar", f"local-dir:{world / 'clip'}"
    if command == "train":
        changes = {"val_data": f"{world}/scenes/eval-{{000..001}}.tar", "val_frequency": VALIDATIONS, "workers": 2}
        changes |= {"max_steps": STEPS, "save_frequency": 2, "log_every_n_steps": 1, "resume": "latest"}
        return ["train", *flags(world, out, **changes)]
    if command in ("features", "shared"):
        sizes = "--batch-size 16 --shard-size 25 --workers 2 --nouns words".split()
        return ["features", "--train-data", source, "--model", clip, "--out", str(out), *sizes]
    return ["data", "pack", source, "--out", str(out), "--shard-size", "20", "--shuffle"]


def files(out: Path) -> dict[str, Path]:
    """Return the files below a folder; not those that a run set aside, of one killed before its first checkpoint."""
    names = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path for name, path in names.items() if not name.startswith("pacl/earlier-")}


def results(out: Path) -> dict[int, dict]:
    """Return the validations of a run by their steps; raise AssertionError if one step has two results."""
    found: dict[int, dict] = {}
    for row in lines(out / "pacl/results.jsonl"):
        assert found.setdefault(row["step"], row) == row, "a validation that was made again has another result"
    return found


def compare(command: str, out: Path, whole: Path) -> None:
    """Raise AssertionError unless `out` holds what `whole` does: no file more, the same bits, every validation."""
    mine, theirs = files(out), files(whole)
    assert mine.keys() == theirs.keys(), f"other files: {sorted(mine.keys() ^ theirs.keys())}"
    if command != "train":
        for name, path in mine.items():
            assert path.read_bytes() == theirs[name].read_bytes(), f"{name} has other bytes"
        return
    last, expected = (load_checkpoint(checkpoints(logs / "pacl/checkpoints")[-1]) for logs in (out, whole))
    assert_same_state(last, expected)
    weights = "pacl/embedder/model.safetensors"
    assert mine[weights].read_bytes() == theirs[weights].read_bytes(), "the embedder has other weights"
    assert results(out) == results(whole), "a validation is lost or has another result"
    notes = [json.loads((logs / "pacl/embedder/config.json").read_bytes())["training"] for logs in (out, whole)]
    assert notes[0]["metrics"] == notes[1]["metrics"] and notes[0]["steps"] == STEPS, "the embedder has older metrics"


def start(command: str, argv: list[str], log: Path, rng: random.Random) -> list[int]:
    """Start a command; return the numbers of its processes, several for "shared"."""
    return fork_ranks(argv, rng.choice((2, 3)), log) if command == "shared" else [fork_pacl(argv, log)]


def kill(processes: list[int], rng: random.Random, seconds: float) -> bool:
    """Kill a process after a random time below `seconds`, alone or with its children; return False if it had ended.

    The others end with an error, or well if they had nothing left to do. Those that still wait for a process that
    never came are killed after ten seconds, as torchrun does it.
    """
    time.sleep(rng.uniform(0, seconds))
    send, killed = rng.choice((os.kill, os.killpg)), rng.choice(processes)
    send(killed, signal.SIGKILL)
    code = status(killed)
    assert code in (0, -signal.SIGKILL), f"the command ended with status {code}"
    end = time.monotonic() + 10
    for process in processes:
        if process != killed:
            with contextlib.suppress(TimeoutError):
                other = status(process, max(0.0, end - time.monotonic()))
                assert other in (0, 1), f"another process ended with status {other}"
    return code != 0


def run_loop(command: str, kills: int, seed: int, world: Path, folder: Path) -> Figures:
    """Kill the command `kills` times over as many rounds as that takes; raise AssertionError for a difference."""
    rng, found = random.Random(f"{seed} {command}"), Figures(command)
    whole, log = folder / f"{command}_whole", folder / f"{command}_output"
    begin = time.monotonic()
    code = status(fork_pacl(words(command, world, whole), log))
    # Several processes take longer to find each other than a single one to begin.
    seconds = (time.monotonic() - begin) * (1.5 if command == "shared" else 1)
    assert code == 0, log.read_text()
    out = folder / command
    while found.kills < kills:
        found.rounds += 1
        log.unlink()
        argv, here = words(command, world, out), 0
        while here < MOST and found.kills < kills and kill(start(command, argv, log, rng), rng, seconds):
            here, found.kills = here + 1, found.kills + 1
            found.early += not (
                out.exists() and any(path.suffix in (".pt", ".tar", ".json") for path in out.rglob("*"))
            )
        codes = [status(process) for process in start(command, argv, log, rng)]
        assert not any(codes), log.read_text()
        compare(command, out, whole)
        shutil.rmtree(out)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="Number of kills of each command.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kill_loop."))
    world, failed = make_world(folder), False
    for command in arguments.commands:
        try:
            print(run_loop(command, arguments.kills, arguments.seed, world, folder), flush=True)
        except AssertionError as error:
            failed = True
            print(f"{command}: WRONG: {error} (in {folder})", flush=True)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
