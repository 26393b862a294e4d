"""benchmarks/words.py runs, and the embeddings with and without padding agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/words.py"


@pytest.mark.long
def test_it_runs(tmp_path):
    out = tmp_path / "words.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--repeats", "1", "--threads", "1", "--json", str(out)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(out.read_text())
    (row,) = result["words"]
    assert (row["templates"], row["words"], result["threads"]) == (1, 1, 1)
    assert row["error"] < 1e-5
    assert 0 < row["cut"]["wall_ms"] and 0 < row["answer"]["cpu_ms"]
