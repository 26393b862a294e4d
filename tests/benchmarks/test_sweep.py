"""`benchmarks/throughput.py --sweep` measures each point once, continues its file, and draws its plots."""

import json
import sys
from pathlib import Path

import pytest

from pacl_kernels.native import native

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import sweep
import throughput

pytestmark = pytest.mark.skipif(native() is None, reason="the native module is not built")
OPTIONS = ["--device", "cpu", "--quick", "--repeats", "2", "--peers", "none", "--backend", "cpu"]


def test_points_are_a_star_of_each_kind():
    args = throughput.parse(OPTIONS)
    found = list(sweep.points(args))
    kinds = 3 * 2 * 2 * 2
    around = {(16, n, d) for n, d in [(49, 64)]}  # --quick has the base (16, 49, 64)
    around |= {(b, 49, 64) for b in sweep.AXES["batch"]}
    around |= {(16, n, 64) for n in sweep.AXES["patches"]} | {(16, 49, d) for d in sweep.AXES["dim"]}
    assert len(found) == kinds * len(around)
    assert {tuple(point[name] for name in sweep.AXES) for point in found} == around
    assert {name for point in found for name in point} == {*sweep.SETTINGS}


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    file, calls = tmp_path / "sweep.json", []
    monkeypatch.setattr(sweep, "AXES", {"batch": (8, 2**30), "patches": (49,), "dim": (64,)})
    monkeypatch.setattr(sweep, "KINDS", {name: choices[:1] for name, choices in sweep.KINDS.items()})
    measure = throughput.measure
    monkeypatch.setattr(throughput, "measure_memory", lambda args, name: (1.0, None))  # its processes take seconds

    def stop(args):
        calls.append(args.batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from measure(args)

    monkeypatch.setattr(throughput, "measure", stop)
    run = [*OPTIONS, "--sweep", str(file)]
    with pytest.raises(KeyboardInterrupt):
        throughput.main(run)
    assert len(json.loads(file.read_text())["points"]) == 2 and calls == [8, 16]
    throughput.main([*run, "--plot", str(tmp_path / "plot.svg")])
    found = json.loads(file.read_text())
    small, large, base = found["points"]
    assert calls == [8, 16, 16], "a point was measured again"
    assert small["settings"]["batch"] == 8 and small["unit"] == 2 * 8 * 8 * 49 * 64
    assert [row["name"] for row in base["rows"]] == ["fused cpu", "matrix products"]
    assert base["rows"][0]["relative_error"] < 1e-5 and base["rows"][0]["step_ms"] > 0
    assert "GiB are free" in large["reason"] and large["rows"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "plot-light.svg", "plot-dark.svg"}
    assert "<svg" in (tmp_path / "plot-dark.svg").read_text()
    with pytest.raises(SystemExit, match=r"^--sweep: .*sweep.json has options .* or another file"):
        throughput.main([*run, "--temperature", "0.5"])


def test_a_sweep_of_another_machine_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "sweep.json"
    monkeypatch.setattr(sweep, "AXES", {"batch": (8,), "patches": (49,), "dim": (64,)})
    monkeypatch.setattr(sweep, "KINDS", {name: choices[:1] for name, choices in sweep.KINDS.items()})
    monkeypatch.setattr(throughput, "measure_memory", lambda args, name: (1.0, None))
    throughput.main([*OPTIONS, "--sweep", str(file), "--batch", "8"])
    found = json.loads(file.read_text())
    assert len(found["points"]) == 1
    found["machine"]["cpu"], found["points"] = "abacus", []
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=r"^--sweep: .* is of .*'cpu': 'abacus'.* or another file"):
        throughput.main([*OPTIONS, "--sweep", str(file), "--batch", "8"])
