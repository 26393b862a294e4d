"""Test the benchmarks that only a GPU can run, as far as that goes without one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cuda_experiments
import cuda_switches
from check_commands import check

ROOT = Path(__file__).resolve().parents[2]


def commands(*stages):
    """Return the commands of `on_gpu.sh`, by name."""
    script = [ROOT / "benchmarks/on_gpu.sh", "--list", *stages]
    listed = subprocess.run(
        script, check=True, capture_output=True, text=True, env=os.environ | {"PYTHON": "python3"}
    ).stdout
    return {name: shlex.split(command) for name, _, command in (line.split("\t") for line in listed.splitlines())}


def test_every_command_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len(found) > 30 and not {name: wrong for name, x in found.items() if (wrong := check(x))}
    assert list(commands("plan", "exp")) == ["plan-dot", "plan-cosine", "plan-max", "experiments"]


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("python3 benchmarks/nothing.py", "there is no benchmarks/nothing.py"),
        ("python3 benchmarks/cuda_switches.py --repeat 3 --nothing", "cuda_switches.py ends with 2"),
        ("env A=1 python3 -m pytest -k small tests/kernels/nothing.py", "there is no tests/kernels/nothing.py"),
    ],
)
def test_a_wrong_command_is_found(command, wrong, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert wrong in check(command.split())


def test_the_largest_part_is_the_explanation():
    ms = {"as it is": 9.0, "close rows": 8.5, "no stores": 5.5, "forward": 5.0, "transposed, bulk stores": 6.0}
    assert cuda_experiments.verdict(ms)[0] == "the path of the stores"
    assert cuda_experiments.verdict(ms | {"close rows": 5.6})[0] == "memory"
    assert cuda_experiments.verdict(ms | {"no stores": 8.0})[0] == "latency and arithmetic of the epilogue"
    assert "the path of the stores holds; bulk stores gain 3.000 ms" in cuda_experiments.show("B1", "dot", ms)


def test_the_switches_and_their_defaults():
    rows = []
    for form, fits in (("dot", True), ("cosine", False)):
        for chosen in cuda_switches.combinations(form, fits):
            ms = 10.0 * (0.5 if chosen["transposed_weights"] else 1.0) * (0.8 if chosen["cluster"] == 2 else 1.0)
            ms *= 1.1 if chosen["cosine_from_attention"] else 1.0
            rows.append(dict(batch=1, patches=2, dim=3, form=form, **chosen, ms=ms))
    assert len(rows) == 4 + 8
    assert cuda_switches.ratio(rows, "transposed_weights") == pytest.approx(0.5)
    text = cuda_switches.table(rows)
    assert text.count("**4.00**") == 2
    assert "transposed_weights: True takes 0.500 of False; the default that follows is True" in text
    assert "cosine_from_attention: True takes 1.100 of False; the default that follows is False" in text
