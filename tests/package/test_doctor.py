"""`pacl doctor` lists what this machine has and checks that each backend computes the right result."""

import json
from types import SimpleNamespace

import pytest
import torch
from pacl import self_check
from pacl.cli import main

from pacl_kernels import available_backends, backends


def backend(**changes):
    """Return the `torch` backend with some of its functions replaced."""
    own = backends.get("torch")
    return SimpleNamespace(**vars(own) | changes)


@pytest.fixture
def doctor_with(monkeypatch, capsys):
    """Return a function that runs the doctor with another backend named `torch`: exit status, JSON, line of text."""

    def run(module):
        monkeypatch.setitem(backends._BACKENDS, "torch", module)
        status = main(["doctor", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert main(["doctor"]) == status
        listed = capsys.readouterr().out.split("Backends")[1]
        line = next(line for line in listed.splitlines() if line.startswith("  torch "))
        return status, found["checks"]["torch"], line

    return run


def test_report(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"] == available_backends()
    assert found["packages"]["torch"] == torch.__version__ or found["packages"]["torch"] in torch.__version__
    assert "torch" in found["checks"]
    for check in found["checks"].values():
        assert 0 < check["error"] < check["tolerance"] and check["failure"] is None


def test_it_names_what_computes_something_else(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setitem(self_check.TOLERANCES, torch.float32, 1e-9)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "torch      FAILED (float32 on " in printed and "expected at most 1e-09" in printed


def test_a_backend_that_raises_is_a_line_of_the_report(doctor_with):
    def compatibility_forward(*_):
        raise RuntimeError("the first line\nthe second")

    status, check, line = doctor_with(backend(compatibility_forward=compatibility_forward))
    assert status == 1
    assert check["failure"] == "RuntimeError: the first line" and check["error"] is None
    assert line.endswith(": RuntimeError: the first line")


def test_an_answer_that_is_not_finite_is_a_failure_in_valid_json(doctor_with):
    def compatibility_forward(patches, texts, mask, temperature, form, phi, lse):
        phi.fill_(torch.nan)
        lse.zero_()

    status, check, line = doctor_with(backend(compatibility_forward=compatibility_forward))
    assert status == 1 and check["error"] is None
    assert check["failure"] == "an answer is not finite" and "not finite" in line


def test_a_backend_is_tried_in_a_dtype_that_it_takes(doctor_with):
    """A 16-bit backend such as `cuda` is tried in 16 bits, with the tolerance of their rounding."""

    def why_not(device=None, dtype=None):
        return None if dtype in (None, torch.bfloat16) else "it takes bfloat16"

    status, check, line = doctor_with(backend(why_not=why_not))
    assert status == 0 and check["failure"] is None
    assert check["dtype"] == "bfloat16" and 1e-4 < check["error"] < check["tolerance"] == 1e-2
    assert "(bfloat16 on " in line


def test_a_backend_that_takes_nothing_that_is_tried(doctor_with):
    def why_not(device=None, dtype=None):
        return None if dtype is None else "it takes nothing"

    status, check, line = doctor_with(backend(why_not=why_not))
    assert status == 1 and "none of the devices and dtypes" in check["failure"] and "FAILED: it takes none" in line
