"""The plan of a step: its memory is what a step takes, its time comes near to what was measured on other shapes."""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_memory import _run as measured_growth

from pacl_kernels import Plan, __main__, calibration, costs, machines, plan
from pacl_kernels.costs import Step
from pacl_kernels.machines import CPU_SHAPE, CPUS, H100, H100_FILES, H100_SHAPE, Timing
from pacl_kernels.native import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import distributed as distributed_benchmark
import plan_errors
from fill_tables import ROOT, Results

needs_native = pytest.mark.skipif(native() is None, reason="the native module, which plans the workspace, is not built")
MIB = 2**20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Keep the user's cache folder out of the tests, and calibrate with a step that takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "SHAPES", {"cpu": (8, 9, 16)})
    monkeypatch.setattr(calibration, "BLOCK", {"cpu": MIB})


# Against measurements


def _rows(file: str) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((ROOT / "benchmarks/results" / file).read_text())["rows"]}


def test_the_rates_come_from_the_files():
    for cpu in CPUS.values():
        for timing, file in cpu.timings.values():
            rows = _rows(file)
            expected = rows["matrix products"]["step_ms"], rows["fused cpu"]["forward_ms"], rows["fused cpu"]["step_ms"]
            assert timing[:3] == pytest.approx(expected, abs=6e-4), file
            eager = rows.get("eager, sum of a s") or _rows(file.replace("11-29", "11-27"))["eager, sum of a s"]
            assert timing.eager == pytest.approx(eager["step_ms"], abs=6e-4), file
    dot, cosine = map(_rows, H100_FILES)
    for backend, timing in H100.items():
        expected = Timing(
            dot["matrix products"]["step_ms"],
            dot[f"fused {backend}"]["forward_ms"],
            dot[f"fused {backend}"]["step_ms"],
            dot["eager, sum of a s"]["step_ms"],
            cosine[f"fused {backend}"]["forward_ms"],
            cosine[f"fused {backend}"]["step_ms"],
        )
        assert timing == pytest.approx(expected, abs=6e-4), backend


@pytest.fixture
def no_kept_scores(monkeypatch) -> None:
    """Plan for the kernels before scores were kept, with which the CPUs were measured."""
    monkeypatch.setattr(machines, "traits", functools.partial(machines.traits, keeps_scores=False))


@pytest.mark.parametrize(
    "device, dtype, shape, options, ms",
    [
        ("H100", "bfloat16", H100_SHAPE, {}, H100["cuda"].step),
        ("h100", "bfloat16", H100_SHAPE, {"form": "cosine"}, H100["cuda"].cosine),
        ("H100", "bfloat16", H100_SHAPE, {"backend": "triton"}, H100["triton"].step),
        *(
            (name, dtype, CPU_SHAPE, {}, timing.step)
            for name, cpu in CPUS.items()
            for dtype, (timing, _) in cpu.timings.items()
        ),
    ],
)
def test_the_plan_of_a_measured_step_is_what_was_measured(device, dtype, shape, options, ms, no_kept_scores):
    found = plan(*shape, device=device, dtype=dtype, **options)
    assert 1e3 * found.seconds == pytest.approx(ms, rel=0.03)
    assert "measured (20" in found.source


def test_cores_of_a_given_peak(no_kept_scores):
    """The peak alone, which the files have too, predicts the steps that other rates come from within a fifth."""
    for cpu in CPUS.values():
        for dtype, (timing, file) in cpu.timings.items():
            peak = json.loads((ROOT / "benchmarks/results" / file).read_text())["peak"]
            found = plan(*CPU_SHAPE, dtype=dtype, device=f"2x{peak / 2e9:.1f}")
            assert 1e3 * found.seconds == pytest.approx(timing.step, rel=0.2), file


@needs_native
def test_the_errors_on_all_other_results():
    """Medians of 15 % of time and 5 % of memory, and the file from which docs/performance.md has them."""
    found = list(plan_errors.rows(Results()))
    errors = plan_errors.summary(found)
    assert errors["rows"] >= 45 and errors["rows_of_other_shapes"] >= 17 and errors["memory_rows"] >= 53
    assert errors["median_time"] <= 0.15 and errors["median_time_of_other_shapes"] <= 0.15
    assert errors["median_memory"] <= 0.05
    assert errors["worst_time"] <= 0.5, "docs/performance.md says which rows are far off"
    kept = Results().read("plan-errors")["rows"]
    renew = "renew it: python benchmarks/plan_errors.py --json benchmarks/results/DATE-plan-errors.json"
    assert [(row["result"], row["of"]) for row in found] == [(row["result"], row["of"]) for row in kept], renew
    for now, then in zip(found, kept, strict=True):
        assert now["predicted_ms"] == pytest.approx(then["predicted_ms"], rel=1e-3), renew
        assert now["measured_ms"] == then["measured_ms"], renew


@needs_native
def test_the_memory_of_a_step():
    """The peak of real steps, which is measured as in test_memory.py, at sizes that no result has."""
    steps = [("dot", "float32", 1500, 7, 70), ("dot", "bfloat16", 1111, 3, 33), ("cosine", "float32", 901, 23, 130)]
    grown = measured_growth([("cpu", form, 2, dtype, b, n, d) for form, dtype, b, n, d in steps])
    for (form, dtype, b, n, d), grew in zip(steps, grown, strict=True):
        found = plan(b, n, d, form=form, dtype=dtype, device="epyc-zen4", threads=2)
        expected = found.peak - found.memory["patches and texts"]
        assert grew == pytest.approx(expected, rel=0.05), (form, grew / MIB, expected / MIB, found.memory)


# By hand


def test_a_plan_by_hand():
    b, n, d = 32768, 196, 512
    found = plan(b, n, d, dtype=torch.bfloat16, device="H100")
    assert isinstance(found, Plan) and found.texts == b and found.backend == "cuda"
    rows, texts = 2 * b * n * d, 2 * b * d
    assert found.memory["patches and texts"] == found.memory["their gradients"] == rows + texts
    assert found.memory["pairs"] == 3 * 4 * b * b and found.memory["sum over texts"] == 4 * b * d
    assert 256 * MIB < found.memory["workspace"] < 512 * MIB
    assert found.peak == sum(found.memory.values()) and found.seconds == sum(found.kernels.values())
    assert found.kernels["exchange"] == 0
    assert found.eager_memory > 6 * 2 * b * b * n, "six arrays of all scores"
    assert found.seconds < found.eager_seconds < 20 * found.seconds
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.peak = 0
    lines = str(found).splitlines()
    assert lines[0] == "dot, infonce, bfloat16: B = 32,768, K = 32,768, N = 196, D = 512"
    assert any(re.match(r"  pairs +12\.0 GiB$", line) for line in lines), lines
    assert re.match(r"largest batch in 74\.5 GiB +[\d,]+ +[\d,]+$", lines[-1]), lines


def test_the_largest_batch_fits_and_the_next_does_not():
    def peak(batch):
        return plan(batch, 49, 64, form="cosine", device="H100", dtype="bfloat16").peak

    for memory in (2**30, 5 * 2**30):
        largest = plan(7, 49, 64, form="cosine", device="H100", dtype="bfloat16", memory=memory).largest_batch
        assert peak(largest) <= memory < peak(largest + 1)
    assert plan(7, 49, 64, device="H100", memory=1).largest_batch == 0
    assert plan(7, 49, 64, device="8x115").largest_batch is None


def test_options_change_the_plan(request):
    def of(device="epyc-zen4", **options):
        return plan(512, 196, 512, device=device, **options)

    base = of()
    assert of(frozen_texts=True).seconds < base.seconds and not of(frozen_texts=True).memory["sum over texts"]
    assert of(masked=True).seconds == base.seconds
    assert of(loss="sigmoid").memory["pairs"] == 0
    assert of(form="cosine").seconds > base.seconds > of(form="max").seconds
    assert of(threads=8).seconds == pytest.approx(base.seconds / 4)
    assert of(threads=8).source == f"{base.source}; scaled from 2 to 8 cores"
    assert of(dtype="bfloat16").seconds < base.seconds
    few = plan(512, 196, 512, 8, device="epyc-zen4")
    assert few.texts == 8 and few.seconds < base.seconds / 10 and few.memory["pairs"] == 3 * 4 * 512 * 8
    assert "predicted" in of("A100").source and "predicted" in of("8x115").source
    assert of("A100", dtype="bfloat16").backend == of("H100", dtype="float32").backend == "triton"
    h200, h100 = (of(name, dtype="bfloat16").kernels for name in ("H200", "H100"))
    assert h200["products"] == h100["products"] and h200["traffic"] < h100["traffic"]
    request.getfixturevalue("no_kept_scores")
    without = of()
    assert without.seconds > base.seconds and of(loss="sigmoid").seconds < without.seconds
    assert of(dtype="float16").seconds == pytest.approx(without.seconds, rel=0.05)


@pytest.mark.parametrize("world, local", [(4, 64), (8, 4096), (64, 4096)])
def test_what_processes_send(world, local):
    """The bytes are those of benchmarks/distributed.py, which counts them on a loopback device."""
    step = Step(local, 196, 512, local * world, "dot", "bfloat16", "infonce", world_size=world)
    provider = "ring" if step.ring else "gather"
    header = distributed_benchmark.HEADER * (world - 1)
    for scatters in (False, True):
        expected = distributed_benchmark.formula(provider, world, local, 196, 512, 2, scatters) - header
        assert costs.sent_bytes(step, scatters) == pytest.approx(expected)
    assert step.ring == (world == 64)
    found = plan(local, 196, 512, dtype="bfloat16", device="H100", world_size=world)
    assert found.texts == local * world and found.kernels["exchange"] > 0 and found.memory["texts of all processes"] > 0


def test_the_tiles_are_those_of_the_kernels():
    text = (ROOT / "csrc/cuda/plan.h").read_text()
    for name, widths in (("kWidths", costs.WIDTHS), ("kPackedWidths", costs.PACKED_WIDTHS)):
        assert tuple(map(int, re.search(rf"int {name}\[\] = {{(.*)}};", text)[1].split(", "))) == widths
    assert int(re.search(r"kLeastOfOneTile = (\d+)", text)[1]) == costs.ONE_TILE.start
    # The shares of the table in docs/cuda.md.
    for patches, share in {49: 0.88, 196: 0.98, 256: 1.0, 576: 1.0, 729: 0.98, 1369: 0.98}.items():
        assert costs.tile_use(patches, "cuda") == pytest.approx(share, abs=0.006), patches


# This machine


@needs_native
def test_this_machine_is_measured_once(tmp_path, monkeypatch):
    folder = tmp_path / "pacl_kernels"
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        first = plan(64, 9, 16, device="cpu")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers have changed"
    (file,) = folder.iterdir()
    assert first.seconds > 0 and first.backend == "cpu" and first.source == "measured on this machine"
    assert first.capacity is not None and first.largest_batch > 64
    assert plan(64, 9, 16, device="cpu").seconds == first.seconds, "measured again"
    assert [file] == list(folder.iterdir())
    for broken in ("", "{", "{}", '{"rates": {}}', file.read_text().replace('"library": ', '"library": "x", "y": ')):
        file.write_text(broken)
        assert plan(64, 9, 16, device="cpu").seconds > 0
        assert calibration.read(file) is not None, "a broken file stays"
    plan(64, 9, 16, device="cpu", dtype="bfloat16")
    assert len(list(folder.iterdir())) == 2, "a dtype has its own rates, and no temporary file is left"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert plan(64, 9, 16, device="cpu").seconds > 0, "a cache folder that cannot be written is no reason to fail"


def test_the_torch_backend_here():
    found = plan(64, 9, 16, device="cpu", backend="torch", form="cosine")
    assert found.backend == "torch" and found.memory["workspace"] >= costs.PROMISED


# Errors and the command


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"batch": 0}, ValueError, "batch is 0, expected at least 1"),
        ({"patches": 1.5}, TypeError, "patches is a float, expected an integer"),
        ({"dim": True}, TypeError, "dim is a bool, expected an integer"),
        ({"texts": -1}, ValueError, "texts is -1, expected at least 1"),
        ({"memory": 0}, ValueError, "memory is 0, expected at least 1"),
        ({"world_size": 0}, ValueError, "world_size is 0, expected at least 1"),
        ({"form": "mean"}, ValueError, "form is 'mean', expected one of 'dot', 'cosine', 'max'"),
        ({"loss": "clip"}, ValueError, "loss is 'clip', expected one of"),
        ({"dtype": torch.float64}, ValueError, "dtype is 'float64', expected one of 'float32'"),
        ({"device": "V100"}, ValueError, "device is 'V100', expected cpu, cuda, one of H100, .* such as 8x115"),
        ({"device": "0x10"}, ValueError, "device is '0x10', expected"),
        ({"device": "H100", "threads": 2}, ValueError, "threads is 2 and the device is H100, expected no threads"),
        ({"device": "A100", "backend": "cuda"}, ValueError, "backend is 'cuda', expected one of auto, triton for A100"),
    ],
)
def test_errors(changes, error, message):
    arguments = {"batch": 8, "patches": 9, "dim": 16, "device": "8x115"} | changes
    with pytest.raises(error, match=f"^{message}"):
        plan(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here():
    with pytest.raises(ValueError, match="^device is 'cuda', expected cpu or the name of a machine .* no GPU here"):
        plan(8, 9, 16, device="cuda")


def test_the_command(capsys):
    __main__.main(["plan", "--batch", "32768", "--device", "H100", "--memory", "80"])
    assert capsys.readouterr().out == f"{plan(32768, 196, 512, dtype='bfloat16', device='H100', memory=80 * 2**30)}\n"
    with pytest.raises(SystemExit):
        __main__.main(["plan", "--batch", "8", "--device", "V100"])
    assert "error: device is 'V100', expected" in capsys.readouterr().err
    __main__.main([])
    assert "reference  available" in capsys.readouterr().out


def test_machines_have_names():
    assert set(machines.NAMES) == {"H100", "H200", "A100", "L4", "B200", *CPUS}
    for name in machines.NAMES:
        for dtype in costs.ITEMSIZE:
            assert plan(256, 196, 512, device=name, dtype=dtype).seconds > 0
