"""`benchmarks/throughput.py --sweep` measures each point once, continues its file, and draws its plots."""

import json
import sys
from pathlib import Path

import pytest

from pacl_kernels import machines
from pacl_kernels.native import native

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import performance_tables
import sweep
import throughput
from fill_tables import Results

pytestmark = pytest.mark.skipif(native() is None, reason="the native module is not built")
OPTIONS = ["--device", "cpu", "--quick", "--repeats", "2", "--peers", "none", "--backend", "cpu"]


@pytest.fixture
def small(monkeypatch):
    """Make sweeps of one kind and of three points, of which one does not fit, without calibration."""
    monkeypatch.setattr(sweep, "AXES", {"batch": (8, 2**30), "patches": (49,), "dim": (64,)})
    monkeypatch.setattr(sweep, "KINDS", {name: choices[:1] for name, choices in sweep.KINDS.items()})
    monkeypatch.setattr(sweep, "CORNERS", ())
    monkeypatch.setattr(sweep.calibration, "this_machine", lambda kind, dtype, _: machines.named("2x50", dtype))
    monkeypatch.setattr(throughput, "measure_memory", lambda args, name: (1.0, None))  # its processes take seconds


def test_points_are_a_star_in_order_of_worth():
    args = throughput.parse(["--device", "cpu"])
    found = list(sweep.points(args))
    usual = {name: choices[0] for name, choices in sweep.KINDS.items()}
    centre = {"batch": 256, "patches": 196, "dim": 512} | usual
    assert found[0] == centre and len({tuple(point.values()) for point in found}) == len(found)

    def changes(point):
        return {name for name in point if point[name] != centre[name]}

    options = [point for point in found if len(changes(point)) == 1 and changes(point) <= usual.keys()]
    assert options == found[1:6]
    arms = [point for point in found if changes(point) and changes(point) <= sweep.AXES.keys()]
    assert arms == found[6 : 6 + len(arms)] and len(arms) == sum(map(len, sweep.AXES.values())) - 3
    corners = found[6 + len(arms) : 6 + len(arms) + len(sweep.CORNERS)]
    assert all(len(changes(point)) > 1 for point in corners)
    assert {point["patches"] for point in found} == {49, 196, 256, 576, 729, 1369} and len(found) < 150


def test_a_sweep_goes_on_where_it_stopped(small, tmp_path, monkeypatch, capsys):
    file, calls = tmp_path / "2026-01-01-abacus-sweep.json", []
    measure = throughput.measure

    def stop(args):
        calls.append(args.batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from measure(args)

    monkeypatch.setattr(throughput, "measure", stop)
    run = [*OPTIONS, "--sweep", str(file)]
    with pytest.raises(KeyboardInterrupt):
        throughput.main(run)
    assert len(json.loads(file.read_text())["points"]) == 1 and calls == [16, 8]
    throughput.main([*run, "--minutes", "0.01"])
    assert calls == [16, 8] and "1 points are left" in capsys.readouterr().err
    throughput.main([*run, "--plot", str(tmp_path / "plot.svg")])
    found = json.loads(file.read_text())
    base, large, few = found["points"]
    assert calls == [16, 8, 8], "a point was measured again"
    assert few["settings"]["batch"] == 8 and few["unit"] == 2 * 8 * 8 * 49 * 64
    assert [row["name"] for row in base["rows"]] == ["fused cpu", "matrix products"]
    assert base["rows"][0]["relative_error"] < 1e-5 and base["rows"][0]["step_ms"] > 0
    # Scores that stay leave the backward without a product; 2 × 50 GFLOP/s at the part that a core reaches.
    plan = base["plan"]
    assert 3 <= plan["units"] <= 4
    assert plan["kernels_ms"]["products"] == pytest.approx(1e3 * plan["units"] * base["unit"] / 80e9)
    assert plan["step_ms"] == pytest.approx(sum(plan["kernels_ms"].values()))
    assert "GiB are free" in large["reason"] and large["rows"] == []
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".svg"}
    assert "<svg" in (tmp_path / "plot-dark.svg").read_text() and (tmp_path / "plot-light.svg").exists()
    for point, ratio in ((base, 2.0), (few, 0.9)):
        point["rows"][0]["step_vs_products"] = ratio
    file.write_text(json.dumps(found))
    table = performance_tables.sweep(Results(tmp_path), "abacus-sweep")
    assert "3 points, 1 of them at or below their bare products, 1 without memory" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert f"| 2.00 | {plan['units'] / 4:.2f} |" in table and table.count("\n| float32, `dot` |") == 1
    with pytest.raises(SystemExit, match=r"^--sweep: .*sweep.json has options .* or another file"):
        throughput.main([*run, "--temperature", "0.5"])
    found["machine"]["cpu"], found["points"] = "abacus", []
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=r"^--sweep: .* is of .*'cpu': 'abacus'.* or another file"):
        throughput.main(run)


def test_plain_pytorch_has_a_wall():
    kind = {name: choices[0] for name, choices in sweep.KINDS.items()}
    shape = {"batch": 256, "patches": 196, "dim": 512}
    reason = "needs about 62.6 GiB, 22.2 GiB are free"
    found = {"points": []}
    for batch in (4096, 2048, 1024):
        row = {"name": "eager", "reason": reason if batch > 1024 else None, "step_ms": 1.0 if batch <= 1024 else None}
        found["points"].append({"settings": shape | kind | {"batch": batch}, "rows": [row]})
    assert sweep.walls(found, shape, kind) == {"eager": 2048}
