"""benchmarks/fixed_costs.py names every layer of a step, and its layers add up to the step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pacl_kernels import available_backends

SCRIPT = Path(__file__).parents[2] / "benchmarks/fixed_costs.py"


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the cpu backend is not built")
def test_it_runs(tmp_path):
    out = tmp_path / "costs.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "20", "--json", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    least = {row["layer"]: row["least_us"] for row in rows}
    assert min(least.values()) > 0, "a layer is never entered: its functions have moved"
    *layers, timed, _ = least.values()
    assert sum(layers) <= timed
