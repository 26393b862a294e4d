"""benchmarks/scale.py computes what the formulas of docs/scale.md say."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import scale
from scale import Rates, costs


def test_costs():
    b, f = 2**23, 2 * 2 * 3 + 4 * 4 + 200
    found = costs(1000, 2, Rates(towers=10, train=100, shard_bytes=b, patches=2, width=3, dim=4))
    live = {"stored": 1000 * b, "before": 0, "training": 2000 * 0.11, "network": 2000 * b, "requests": 2000}
    assert found["live towers"] == pytest.approx(live | {"feed": b / 0.11})
    features = {"stored": 1000 * (b + f), "before": 100, "training": 20, "network": 1000 * b + 4000 * f}
    assert found["features"] == pytest.approx(features | {"requests": 1000 + 6000, "feed": f * 100})


def test_rates_of_a_reader():
    words = "--pairs 864e6 --epochs 2 --towers 10000 --train 1000 --shard-bytes 1e6 --patches 1000 --width 1000 --dim 0"
    printed = subprocess.run([sys.executable, scale.__file__, *words.split()], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    row = [cell.strip() for cell in printed.stdout.splitlines()[-1].strip("|").split("|")]
    assert row == ["864 million", "features", "2592.17", "1.0", "20.0", "7776.7", "5287.00", "2000.20"]
