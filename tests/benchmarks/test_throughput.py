"""`benchmarks/throughput.py` runs, gets the right result from every provider, and says why one is missing."""

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from pacl_kernels import backends
from pacl_kernels.native import native

ROOT = Path(__file__).resolve().parents[2]
# Rows that need a GPU, a package that is not among those of "dev", or --max-autotune.
ABSENT = "max-autotune FlexAttention late-interaction flash-maxsim maxsim-cpu floor:~memeff floor:~siglip".split()
ABSENT = tuple(name.replace("~", " ") for name in ABSENT)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # plain PyTorch rounds its scores to the input's dtype
KEYS = (
    "name forward_ms forward_spread step_ms step_spread forward_vs_products step_vs_products forward_share_of_peak "
    "step_share_of_peak step_vs_best_peer extra_memory_mib relative_error reason"
).split()


def throughput(*options, **variables):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--device", "cpu", *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that does a quick run in this process, without torch.compile: its output and its JSON."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")

    def quick(*options):
        from throughput import main

        out = tmp_path / "result.json"
        failure = pytest.raises(SystemExit, match="the row of fused cpu is missing: the native module is not built")
        with failure if native() is None else contextlib.nullcontext():
            main(["--device", "cpu", "--quick", "--repeats", "2", "--json", str(out), *options])
        return capsys.readouterr().out, json.loads(out.read_text())

    return quick


def check(result, expect_reason=()):
    assert result["rows"][-1]["name"] == "matrix products"
    for row in result["rows"]:
        assert set(KEYS) <= set(row)
        assert result["peak"] is None or result["peak"] > 1e9
        if row["name"].startswith((*ABSENT, *expect_reason)):
            assert row["reason"] and row["step_ms"] is None
            continue
        assert row["reason"] is None, row
        assert 0 < row["forward_ms"] < row["step_ms"]
        assert row["step_spread"][0] <= row["step_ms"] <= row["step_spread"][1]
        if row["name"].startswith("floor"):
            assert (row["relative_error"], row["step_vs_best_peer"], row["step_share_of_peak"]) == (None, None, None)
        elif row["name"] != "matrix products":
            assert row["relative_error"] < TOLERANCE[result["settings"]["dtype"]], row


def missing(result):
    """Return the fused CPU rows that cannot run here; they are allowed, as the native module may not be built."""
    return tuple(row["name"] for row in result["rows"] if row["name"].startswith("fused cpu") and row["reason"])


@pytest.mark.parametrize("without", ["compiled", pytest.param("no such provider", marks=pytest.mark.long)])
def test_every_provider_agrees_and_the_files_are_written(without, tmp_path):
    out, chart, trace = tmp_path / "result.json", tmp_path / "chart.svg", tmp_path / "trace.json"
    files = ["--json", str(out), "--plot", str(chart), "--profile", str(trace)]
    avx2 = native() is not None and "avx2" in native().isas()
    files += ["--avx2"] if avx2 else []
    disabled = str(int(without == "compiled"))
    done = throughput("--quick", "--repeats", "2", *files, TORCH_COMPILE_DISABLE=disabled)
    assert done.returncode == (native() is None), done.stderr
    printed, result = done.stdout, json.loads(out.read_text())
    check(result, (without, *missing(result)))
    assert all(row["name"] in printed for row in result["rows"])
    assert len(result["rows"]) == 14 and result["versions"]["torch"] == metadata.version("torch")
    if avx2:
        assert (result["machine"]["cpu_isa"], result["machine"]["torch_cpu_capability"]) == ("avx2", "AVX2")
    report = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(out)]
    printed = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    table = [line for line in printed.splitlines() if line.startswith("|")]
    measured = [row for row in result["rows"] if row["reason"] is None]
    assert len(table) == 2 + len(measured) and len({line.count("|") for line in table}) == 1
    assert all(row["name"] in printed for row in result["rows"])
    assert "<svg" in chart.read_text()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"fused torch", "eager, sum of a s", "matrix products"} <= names


def test_cosine_in_bfloat16_with_frozen_texts_and_without_a_compiler(run):
    peers = ["--peers", "eager, pooled;eager, sum;compiled;scaled"]
    printed, result = run("--form", "cosine", "--frozen-texts", "--dtype", "bfloat16", *peers)
    check(result, ("compiled", *missing(result)))
    assert "torch.compile is disabled" in printed
    assert result["units"] == {"forward": 1 + 49 / 64, "step": 3 + 3 * 49 / 64}
    assert result["operations"] == {"forward": 2, "step": 7}  # with 16 texts, pooling costs less than a Gram matrix


def test_cosine_counts_what_does_not_grow_with_the_texts(run):
    _, result = run("--form", "cosine", "--batch", "32", "--patches", "16", "--peers", "none", "--loss", "sigmoid")
    n, d, k = 16, 64, 32
    assert result["operations"] == {"forward": 1 + n / 2 / d + n / 2 / k, "step": 4 + 2 * n / d + 2 * n / k}
    share, peak = result["rows"][-2]["step_share_of_peak"], result["peak"]
    time = 1e-3 * result["rows"][-2]["step_ms"]
    assert peak is None or abs(share * peak * time / result["operations"]["step"] / result["unit"] - 1) < 1e-9


def test_max_has_its_own_peers_and_one_product(run):
    printed, result = run("--form", "max", "--peers", "max;chunks;late")
    packages = ("late-interaction-kernels", "flash-maxsim")
    check(result, ("compiled", *missing(result)))
    reasons = {row["name"]: row["reason"] for row in result["rows"]}
    assert all("CUDA" in reasons[name] and name in printed for name in packages)
    assert {"eager, max of s", "eager, chunks + checkpoint"} <= set(reasons) and "eager, sum of a s" not in reasons
    assert result["units"] == {"forward": 1, "step": 1 + 2 / 49}


@pytest.mark.skipif(native() is None, reason="the native module is not built")
def test_a_peer_without_backward_has_a_forward_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import peers
    import throughput

    def forward(patches, *others):
        return peers.largest_score(patches.detach(), *others)

    monkeypatch.setitem(peers.PEERS, "forward", peers.Peer(forward, peers.MAX, kind="forward"))
    # Memory is measured in a process of its own, which would not see the new peer.
    monkeypatch.setattr(throughput, "measure_memory", lambda args, name: (None, None))
    out, chart = tmp_path / "result.json", tmp_path / "chart.svg"
    options = ["--device", "cpu", "--quick", "--backend", "cpu", "--form", "max", "--peers", "forward;eager, max"]
    throughput.main([*options, "--frozen-texts", "--json", str(out), "--plot", str(chart)])
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"] if row["reason"] is None}
    row = rows["forward"]
    assert (row["step_ms"], row["step_vs_best_peer"]) == (None, None) and row["forward_ms"] > 0
    assert row["relative_error"] < 1e-4
    best = rows["eager, max of s"]["step_ms"] / rows["fused cpu"]["step_ms"]
    assert abs(rows["fused cpu"]["step_vs_best_peer"] - best) < 1e-9
    assert "| forward |" in throughput.report.throughput(result) and "forward  " in capsys.readouterr().out


def test_what_does_not_fit_is_said():
    done = throughput("--batch", "10000000", "--backend", "torch")
    assert done.returncode != 0
    assert done.stderr.count("\n") < 5 and "GiB" in done.stderr, done.stderr


def test_a_wrong_option_is_one_clear_line():
    done = throughput("--temperature", "0")
    assert done.returncode == 2 and "--temperature: got 0.0, expected a finite number above 0" in done.stderr


def test_a_row_of_ours_that_fails_is_an_error(tmp_path, monkeypatch, capsys):
    """If a backend can run but its step raises, the table gives the error and the run fails."""

    def compatibility_forward(*_):
        raise RuntimeError("the blocks are gone")

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(backends.get("torch"), "compatibility_forward", compatibility_forward)
    import throughput

    # Memory is measured in a process of its own, which would not see the broken backend.
    monkeypatch.setattr(throughput, "measure_memory", lambda args, name: (None, None))
    out = tmp_path / "result.json"
    options = ["--device", "cpu", "--quick", "--backend", "torch", "--peers", "none", "--json", str(out)]
    with pytest.raises(SystemExit, match="^the row of fused torch is missing: RuntimeError: the blocks are gone$"):
        throughput.main(options)
    assert json.loads(out.read_text())["rows"][0]["reason"] == "RuntimeError: the blocks are gone"
    assert "the blocks are gone" in capsys.readouterr().out


@pytest.mark.skipif(backends.get("cuda").why_not() is None, reason="this machine has what the row needs")
def test_a_row_for_another_gpu_may_be_missing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from throughput import missing, parse

    args = parse(["--device", "cpu"])
    args.torch_device = torch.device("cuda")
    cuda, triton = ({"name": f"fused {name}", "reason": "no"} for name in ("cuda", "triton"))
    assert missing({"rows": [cuda]}, args) == ["the row of fused cuda is missing: no"]
    assert missing({"rows": [cuda, triton | {"reason": None}]}, args) == []
    assert missing({"rows": [cuda, triton, {"name": "matrix products", "reason": None}]}, args) != []
