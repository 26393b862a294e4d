"""`pacl doctor` tells what is there and whether it computes what it should."""

import json

import torch
from pacl import doctor
from pacl.cli import main

from pacl_kernels import available_backends


def test_report(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"] == available_backends()
    assert found["packages"]["torch"] == torch.__version__ or found["packages"]["torch"] in torch.__version__
    assert "torch" in found["errors"] and all(0 < error < 1e-5 for error in found["errors"].values())


def test_it_names_what_computes_something_else(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    assert "WRONG" not in capsys.readouterr().out
    monkeypatch.setattr(doctor, "TOLERANCE", 1e-9)
    assert main(["doctor"]) == 1
    assert "torch      " in (printed := capsys.readouterr().out) and "WRONG (expected at most 1e-09)" in printed
