"""The argument and PACL_BACKEND select the backend; one that cannot run says why; `available_backends` lists all."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from accuracy import Spy, assert_accurate
from gpu import on_gpu

import pacl_kernels
from pacl_kernels import available_backends, backends, compatibility, fused_pacl_loss

CPU_IS_BUILT = available_backends()["cpu"] is None
BEST = "cpu" if CPU_IS_BUILT else "torch"


def _ran(dtype=torch.float32, **options) -> set[str]:
    """Return the backends whose operators ran; empty for the reference, which has no operators."""
    patches = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    with Spy() as spy:
        fused_pacl_loss(patches, torch.randn(4, 5, dtype=dtype), 10.0, **options).backward()
    return {backend for _, backend in spy.backends()}


def _python(code: str, **environment) -> str:
    """Return the output of a fresh interpreter, and assert that it succeeds."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "pacl_kernels"])]
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": pacl_kernels.__path__[0] + "/..", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=path | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_available_backends():
    """Every backend maps to None or to one line that says why it cannot run; "torch" and "reference" always run."""
    reasons = available_backends()
    assert set(reasons) == {"cpu", "cuda", "triton", "torch", "reference"}
    assert reasons["torch"] is None and reasons["reference"] is None
    for name, reason in reasons.items():
        assert reason is None or (isinstance(reason, str) and len(reason) > 10 and "\n" not in reason), name
    reasons.clear()
    assert available_backends(), "a caller cannot change the table"


def test_auto_takes_the_best():
    assert _ran() == _ran(backend="auto") == {BEST}
    assert _ran(torch.bfloat16) == {BEST}
    assert _ran(torch.float64) == {"torch"}


@on_gpu
def test_auto_takes_the_fastest():
    fastest = "cuda" if available_backends()["cuda"] is None else "triton"
    assert backends.resolve("auto", torch.device("cuda"), torch.bfloat16) == fastest
    assert backends.resolve("auto", torch.device("cuda"), torch.float32) == "triton"
    assert backends.resolve("auto", torch.device("cuda"), torch.float64) == "torch"


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_argument_and_environment(name, monkeypatch):
    if available_backends()[name] is not None:
        pytest.skip(f"backend {name!r}: {available_backends()[name]}")
    assert _ran(backend=name) == {name}
    monkeypatch.setenv("PACL_BACKEND", name)
    assert _ran() == {name}
    assert _ran(backend="torch") == {"torch"}, "the argument goes before the environment"


def test_reference_runs_no_operator(monkeypatch):
    assert _ran(backend="reference") == set()
    monkeypatch.setenv("PACL_BACKEND", "reference")
    assert _ran() == set()
    torch.manual_seed(0)
    patches, texts = torch.randn(4, 3, 5), torch.randn(6, 5)
    assert_accurate("phi", compatibility(patches, texts), compatibility(patches, texts, backend="torch"), torch.float32)


@pytest.mark.parametrize("function", [fused_pacl_loss, compatibility])
def test_unknown_backend_in_the_environment(function, monkeypatch):
    monkeypatch.setenv("PACL_BACKEND", "gpu")
    arguments = (torch.randn(4, 3, 5), torch.randn(4, 5), *([10.0] if function is fused_pacl_loss else []))
    with pytest.raises(ValueError, match="'gpu', expected one of 'auto'.*'torch'"):
        function(*arguments)
    function(*arguments, backend="torch")  # the argument overrides the environment


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_backend_that_cannot_run_says_why(name, by, monkeypatch):
    """An absent backend, or "cpu" for float64, raises an error with its name and the reason; there is no fallback."""
    dtype = torch.float64 if name == "cpu" else torch.float32
    if name != "cpu" and available_backends()[name] is None:
        pytest.skip("it can run here")
    if by == "environment":
        monkeypatch.setenv("PACL_BACKEND", name)
    with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: .{{10,}}"):
        _ran(dtype, **({"backend": name} if by == "argument" else {}))


def test_module_says_why_not_for_device_and_dtype():
    for name, dtype in (("torch", torch.float64), (BEST, torch.float32), (BEST, torch.bfloat16), (BEST, torch.float16)):
        assert backends.get(name).why_not(torch.device("cpu"), dtype) is None
    if CPU_IS_BUILT:
        assert "float64" in backends.get("cpu").why_not(torch.device("cpu"), torch.float64)
        assert "cuda" in backends.get("cpu").why_not(torch.device("cuda"), torch.float32)


def test_a_slow_choice_warns_once_a_good_one_never():
    code = """
import torch, warnings
from pacl_kernels import fused_pacl_loss
for i in range(3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused_pacl_loss(torch.randn(4, 3, 5), torch.randn(4, 5), 10.0)
    print("call", i, [str(w.message) for w in caught if "pacl" in str(w.message)])
"""
    calls = [line for line in _python(code).splitlines() if line.startswith("call")]
    assert len(calls) == 3 and calls[1].endswith("[]") and calls[2].endswith("[]")
    assert calls[0].endswith("[]") == CPU_IS_BUILT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ran(torch.float64)
        _ran(backend="torch")


def test_python_dash_m_prints_the_table():
    environment = {name: os.environ[name] for name in ("TRITON_INTERPRET",) if name in os.environ}
    lines = _python("", **environment).splitlines()
    assert pacl_kernels.__version__ in lines[0]
    for name, reason in available_backends().items():
        (line,) = [line for line in lines[1:] if line.split()[0] == name]
        assert ("available" if reason is None else reason) in line


def test_import_is_quiet_and_changes_no_settings():
    code = """
import os, torch
before = dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
import pacl_kernels
assert before == (dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
"""
    assert _python(code) == ""
