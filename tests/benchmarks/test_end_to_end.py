"""`benchmarks/end_to_end.py` times both kinds of steps, and draws them."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("timm")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import end_to_end
import performance_tables
from fill_tables import Results


@pytest.mark.long
def test_both_steps_with_both_losses(tmp_path, capsys):
    name = "abacus-end-to-end"
    out, chart = tmp_path / f"2026-01-01-{name}.json", tmp_path / "chart.svg"
    end_to_end.main(["--batches", "3", "--repeats", "1", "--json", str(out), "--plot", str(chart)])
    result = json.loads(out.read_text())
    found = [(row["source"], row["loss"]) for row in result["rows"]]
    assert found == [(source, loss) for source in ("features", "live tower") for loss in ("fused", "eager")]
    for row in result["rows"]:
        assert all(seconds > 0 for part, seconds in row["seconds"].items() if part != "tower")
        assert row["source"] == "features" or row["seconds"]["tower"] > 1e-3
    assert capsys.readouterr().out.count("% in the loss; tower") == 4
    assert {path.name for path in tmp_path.glob("*.svg")} == {"chart-light.svg", "chart-dark.svg"}
    table = performance_tables.end_to_end(Results(tmp_path), name)
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert table.count("\n| features | 3 |") == 1 and table.count("\n| live tower | 3 |") == 1
