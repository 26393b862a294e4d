"""`benchmarks/grad_tolerance.py` runs on a tiny shape, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--batch 200 --patches 4 --dim 16 --repeats 1 --scatters 5 --checked 64".split()


def test_a_run_in_two_parts(tmp_path, monkeypatch):
    """The second part measures what the file lacks. The tolerance shows in the errors. Other settings do not fit."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from grad_tolerance import main

    out = tmp_path / "result.json"
    main([*TINY, "--dtypes", "float32", "--json", str(out)])
    first = json.loads(out.read_text())
    main([*TINY, "--json", str(out)])
    both = json.loads(out.read_text())
    assert both["rows"][:2] == first["rows"] and both["accuracy"][:1] == first["accuracy"]
    names = [(row["dtype"], row["frozen_texts"]) for row in both["rows"]]
    assert names == [("float32", True), ("float32", False), ("bfloat16", True), ("bfloat16", False)]
    assert [row["dtype"] for row in both["accuracy"]] == ["float32", "bfloat16"]
    checked = first["accuracy"][0]
    assert checked["kept_share"] < 0.5
    for kind in ("patches", "texts"):
        error = checked["relative_error"]
        assert error[f"{kind}, exact"] < 1e-5 < 1e-4 < error[f"{kind}, tolerance"] < 1e-2
    with pytest.raises(SystemExit, match="has dim 16, expected 8, or another file"):
        main([*TINY, "--dim", "8", "--json", str(out)])
