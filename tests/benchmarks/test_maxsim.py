"""`benchmarks/maxsim.py` runs on a tiny shape, and its rows agree with each other."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--pages 5 --page-tokens 9 --queries 3 --query-tokens 4 --dim 16 --repeats 2".split()


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    from maxsim import main

    return main


def test_rows_and_json(main, tmp_path, capsys):
    out = tmp_path / "result.json"
    main([*TINY, "--threads", str(torch.get_num_threads()), "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    names = [f"{of} {part}" for of in ("fused", "plain", "padded", "packed") for part in ("forward", "step")]
    assert {*names} <= {row["name"] for row in rows}
    printed = capsys.readouterr().out
    assert all(row["name"] in printed and 0 < row["range_ms"][0] <= row["ms"] <= row["range_ms"][1] for row in rows)


def test_a_wrong_number_is_one_line(main, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--page-tokens", "0"])
    assert "error: --page-tokens: got 0, expected at least 1" in capsys.readouterr().err
