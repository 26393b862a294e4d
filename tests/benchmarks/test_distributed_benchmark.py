"""`benchmarks/distributed.py` sends as many bytes as its formulas say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="needs Linux to count what is sent")
def test_benchmark_counts_what_its_formulas_say(tmp_path):
    """The bytes on the loopback device match the formulas; gathering all patches sends many times as many."""
    pytest.importorskip("open_clip")
    path, sent = tmp_path / "result.json", {}
    script = Path(__file__).parents[2] / "benchmarks" / "distributed.py"
    options = ["--processes=2", "--batch=64", "--patches=16", "--dim=256", "--repeats=3", f"--json={path}"]
    for _ in range(3):  # traffic of other tests can only add
        subprocess.run([sys.executable, str(script), *options], check=True, capture_output=True, timeout=600)
        result = json.loads(path.read_text())
        formulas = {row["what"]: row["formula"] for row in result["rows"]}
        sent = {row["what"]: min(row["sent"], sent.get(row["what"], row["sent"])) for row in result["rows"]}
        if all(sent[what] <= 1.2 * formula + 10_000 for what, formula in formulas.items()):
            break
    for what, formula in formulas.items():
        assert 0.95 * formula <= sent[what] <= 1.2 * formula + 10_000, what
    assert sent["all patches"] > 10 * sent["gather"]
    assert {row["exchange"] for row in result["model"]} == {"gather", "ring"}
