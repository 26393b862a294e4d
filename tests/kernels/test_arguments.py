"""Bad input raises a TypeError or ValueError of one sentence: the argument, what came and what was expected."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from pacl_kernels import PaclLoss, compatibility, fused_pacl_loss

NAN, INF = float("nan"), float("inf")


def _inputs(**changes):
    return {"patches": torch.randn(4, 3, 5), "texts": torch.randn(4, 5)} | changes


# Each row: the changed arguments, the error, and what it must say: the argument, what came, what was expected.
BOTH = [
    ({"patches": [[1.0]]}, TypeError, "patches is a list", r"tensor of shape \[B, N, D\]"),
    ({"patches": np.zeros((4, 3, 5), "float32")}, TypeError, "patches is a ndarray", "tensor"),
    ({"patches": None}, TypeError, "patches is a NoneType", "tensor"),
    ({"texts": "a photo"}, TypeError, "texts is a str", r"tensor of shape \[K, D\]"),
    ({"patches": torch.ones(4, 3, 5, dtype=torch.int64)}, TypeError, "patches is torch.int64", "float32, bfloat16"),
    ({"patches": torch.ones(4, 3, 5, dtype=torch.complex64)}, TypeError, "patches is torch.complex64", "float32"),
    ({"texts": torch.ones(4, 5, dtype=torch.bool)}, TypeError, "texts is torch.bool", "float32"),
    ({"texts": torch.ones(4, 5, dtype=torch.float64)}, TypeError, "texts is torch.float64", "torch.float32"),
    ({"patches": torch.ones(4, 3, 5, dtype=torch.bfloat16)}, TypeError, "texts is torch.float32", "torch.bfloat16"),
    ({"patches": torch.ones(4, 5)}, ValueError, r"patches has shape \[4, 5\]", r"\[B, N, D\]"),
    ({"patches": torch.ones(1, 4, 3, 5)}, ValueError, r"patches has shape \[1, 4, 3, 5\]", r"\[B, N, D\]"),
    ({"patches": torch.ones(4, 5, 3)}, ValueError, "texts has D = 5", r"3 .*patches.transpose\(1, 2\)"),
    ({"patches": torch.ones(4, 2, 3, 5)}, ValueError, r"patches has shape \[4, 2, 3, 5\]", r"patches.flatten\(1, 2\)"),
    (
        {"patches": torch.ones(4, 5, 2, 3)},
        ValueError,
        r"patches has shape \[4, 5, 2, 3\]",
        r"patches.flatten\(2\).transpose\(1, 2\)",
    ),
    ({"patches": torch.tensor(1.0)}, ValueError, r"patches has shape \[\]", r"\[B, N, D\]"),
    ({"texts": torch.ones(5)}, ValueError, r"texts has shape \[5\]", r"\[K, D\]"),
    ({"texts": torch.ones(4, 1, 5)}, ValueError, r"texts has shape \[4, 1, 5\]", r"\[K, D\]"),
    ({"texts": torch.ones(4, 6)}, ValueError, "texts has D = 6", "5"),
    ({"texts": torch.ones(4, 5, device="meta")}, ValueError, "texts is on meta", "cpu"),
    ({"patches": torch.ones(4, 3, 5, device="meta")}, ValueError, "texts is on cpu", "meta"),
    ({"patches": torch.ones(4, 0, 5)}, ValueError, r"patches has shape \[4, 0, 5\]", "N of at least 1"),
    ({"patches": torch.ones(4, 3, 0), "texts": torch.ones(4, 0)}, ValueError, r"patches has shape \[4, 3, 0\]", "D of"),
    ({"patches": torch.ones(4, 3, 5).to_sparse()}, TypeError, "patches is a sparse_coo tensor", "dense"),
    ({"texts": torch.ones(4, 5).to_sparse()}, TypeError, "texts is a sparse_coo tensor", "dense"),
    ({"patch_mask": torch.ones(4, 3).bool().to_sparse()}, TypeError, "patch_mask is a sparse_coo tensor", "dense"),
    ({"patch_mask": [[True]]}, TypeError, "patch_mask is a list", "bool tensor"),
    ({"patch_mask": np.ones((4, 3), bool)}, TypeError, "patch_mask is a ndarray", "bool tensor"),
    ({"patch_mask": torch.ones(4, 3)}, TypeError, "patch_mask is torch.float32", "torch.bool"),
    ({"patch_mask": torch.ones(4, 3, dtype=torch.uint8)}, TypeError, "patch_mask is torch.uint8", "torch.bool"),
    ({"patch_mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"patch_mask has shape \[3, 4\]", r"\[4, 3\]"),
    ({"patch_mask": torch.ones(12, dtype=torch.bool)}, ValueError, r"patch_mask has shape \[12\]", r"\[4, 3\]"),
    ({"patch_mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, r"patch_mask has shape \[4, 1\]", r"\[4, 3\]"),
    ({"patch_mask": torch.ones(4, 3, dtype=torch.bool, device="meta")}, ValueError, "patch_mask is on meta", "cpu"),
    *(
        ({"attn_temperature": tau}, ValueError, f"attn_temperature is {re.escape(str(tau))}", "finite number above 0")
        for tau in (0, 0.0, -0.5, NAN, INF, -INF)
    ),
    *(
        ({"attn_temperature": tau}, ValueError, f"attn_temperature is {came}", "above 0 that float32 holds")
        for tau, came in ((1e39, r"1e\+39"), (1e-46, "1e-46"), (1e-40, "1e-40"), (10**400, "a number beyond float64"))
    ),
    ({"attn_temperature": Fraction(1, 10**46)}, ValueError, "attn_temperature is 1/1", "above 0 that float32 holds"),
    ({"attn_temperature": "warm"}, TypeError, "attn_temperature is a str", "number or a tensor"),
    ({"attn_temperature": None}, TypeError, "attn_temperature is a NoneType", "number or a tensor"),
    ({"attn_temperature": True}, TypeError, "attn_temperature is a bool", "number or a tensor"),
    ({"attn_temperature": 1j}, TypeError, "attn_temperature is a complex", "number or a tensor"),
    ({"attn_temperature": torch.ones(2)}, ValueError, r"attn_temperature has shape \[2\]", "one element"),
    ({"attn_temperature": torch.ones(0)}, ValueError, r"attn_temperature has shape \[0\]", "one element"),
    ({"attn_temperature": torch.tensor(1)}, TypeError, "attn_temperature is a torch.int64", "floating-point"),
    ({"attn_temperature": torch.ones((), device="meta")}, ValueError, "attn_temperature is on meta", "cpu"),
    ({"form": "euclidean"}, ValueError, "form is 'euclidean'", "'dot', 'cosine', 'max'"),
    ({"form": None}, ValueError, "form is None", "'dot', 'cosine', 'max'"),
    ({"form": ["dot"]}, ValueError, r"form is \['dot'\]", "'dot', 'cosine', 'max'"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu'", "'auto'.*'cpu'.*'torch'"),
    ({"backend": None}, ValueError, "backend is None", "'auto'"),
    ({"backend": 3}, ValueError, "backend is 3", "'auto'"),
]
LOSS_ONLY = [
    ({"texts": torch.ones(5, 5)}, ValueError, "texts has 5 rows", "4 images"),
    ({"texts": torch.ones(0, 5)}, ValueError, "texts has 0 rows", "4 images"),
    (
        {"patches": torch.ones(0, 3, 5), "texts": torch.ones(0, 5)},
        ValueError,
        r"patches has shape \[0, 3, 5\]",
        "B of at least 1",
    ),
    ({"logit_scale": "10"}, TypeError, "logit_scale is a str", "number or a tensor"),
    ({"logit_scale": None}, TypeError, "logit_scale is a NoneType", "number or a tensor"),
    ({"logit_scale": False}, TypeError, "logit_scale is a bool", "number or a tensor"),
    ({"logit_scale": torch.ones(3)}, ValueError, r"logit_scale has shape \[3\]", "one element"),
    ({"logit_scale": torch.tensor(10)}, TypeError, "logit_scale is a torch.int64", "floating-point"),
    ({"logit_scale": torch.ones((), device="meta")}, ValueError, "logit_scale is on meta", "cpu"),
    *(
        ({name: value}, ValueError, f"{name} is {came}", "a finite number that float32 holds")
        for name in ("logit_scale", "logit_bias")
        for value, came in (
            (1e39, r"1e\+39"),
            (-1e39, r"-1e\+39"),
            (NAN, "nan"),
            (INF, "inf"),
            (-INF, "-inf"),
            (-(10**400), "a number beyond float64"),
            (np.float64(4e38), r"4e\+38"),
        )
    ),
    ({"logit_bias": "0"}, TypeError, "logit_bias is a str", "number or a tensor"),
    ({"logit_bias": torch.zeros(4)}, ValueError, r"logit_bias has shape \[4\]", "one element"),
    ({"logit_bias": torch.zeros((), device="meta")}, ValueError, "logit_bias is on meta", "cpu"),
    ({"loss": "hinge"}, ValueError, "loss is 'hinge'", "'infonce', 'sigmoid'"),
    ({"loss": None}, ValueError, "loss is None", "'infonce', 'sigmoid'"),
    ({"group": "all"}, ValueError, "group is 'all'", "'world', 'local' or a torch.distributed process group"),
    ({"group": {}}, TypeError, "group is a dict", "torch.distributed process group"),
    ({"group": 0}, TypeError, "group is a int", "torch.distributed process group"),
    ({"exchange": "star"}, ValueError, "exchange is 'star'", "'auto', 'gather', 'ring'"),
]


def _name(case) -> str:
    return "-".join(f"{name}={getattr(value, 'shape', value)}"[:60] for name, value in case[0].items())


@pytest.mark.parametrize("changes, error, came, expected", BOTH, ids=map(_name, BOTH))
def test_compatibility_refuses(changes, error, came, expected):
    _assert_refuses(compatibility, _inputs(**changes), error, came, expected)


@pytest.mark.parametrize("changes, error, came, expected", BOTH + LOSS_ONLY, ids=map(_name, BOTH + LOSS_ONLY))
def test_loss_refuses(changes, error, came, expected):
    _assert_refuses(fused_pacl_loss, _inputs(logit_scale=10.0) | changes, error, came, expected)


def _assert_refuses(function, arguments, error, came, expected):
    with pytest.raises(error, match=f"(?s){came}.*expected.*{expected}") as caught:
        function(**arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 200, "one clear sentence"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_patches_of_different_number_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(n, 5) for n in (2, 3, 1, 3)])
    _assert_refuses(compatibility, _inputs(patches=nested), TypeError, "patches is a nested tensor", "dense")


def test_module_of_many_processes_needs_a_process_group():
    """The error comes at the call, because `init_process_group` may still follow the constructor."""
    for places in ({"world_size": 2}, {"rank": 1, "world_size": 2}, {"world_size": 2, "group": "world"}):
        loss = PaclLoss(**places)
        with pytest.raises(ValueError, match="world_size is 2, expected 1 without an initialised torch.distributed"):
            loss(torch.randn(4, 3, 5), torch.randn(4, 5), 10.0)
    with pytest.raises(ValueError, match="group is 'all', expected 'world', 'local' or a torch.distributed process"):
        PaclLoss(rank=0, world_size=2, group="all")


def test_module_refuses_bad_choices_like_the_function():
    inputs = (torch.randn(4, 3, 5), torch.randn(4, 5), 10.0)
    for arguments, message in (
        ({"form": "euclidean"}, "form is 'euclidean'"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"attn_temperature": -1.0}, "attn_temperature is -1.0"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            PaclLoss(**arguments)(*inputs)


def test_what_looks_odd_but_is_right_is_accepted():
    """NumPy numbers, integers, and a negative or zero logit scale are accepted."""
    arguments = _inputs()
    expected = fused_pacl_loss(**arguments, logit_scale=2.0, attn_temperature=1.0, logit_bias=1.0)
    for one, two in ((1, 2), (np.float32(1), np.float64(2))):
        got = fused_pacl_loss(**arguments, logit_scale=two, attn_temperature=one, logit_bias=one)
        assert torch.equal(got, expected)
    pairs = {"patches": arguments["texts"][:, None], "texts": arguments["texts"]}  # matching pairs have φ = 1
    right, nothing, wrong = (fused_pacl_loss(**pairs, logit_scale=scale).item() for scale in (2, 0, -2.0))
    assert nothing == pytest.approx(np.log(4), rel=1e-6)
    assert right < nothing < wrong


def test_numbers_at_the_ends_of_the_range():
    """Numbers that float32 holds (float64 for float64 patches) are accepted; a negligible scale counts as 0."""
    arguments = _inputs()
    largest, smallest = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    warm, flat = (compatibility(**arguments, attn_temperature=tau) for tau in (1e30, largest))
    torch.testing.assert_close(flat, warm)
    compatibility(**arguments, attn_temperature=smallest)
    nothing, zero = (fused_pacl_loss(**arguments, logit_scale=scale) for scale in (1e-46, 0.0))
    assert torch.equal(nothing, zero)
    wide = {name: x.double() for name, x in arguments.items()}
    torch.testing.assert_close(
        compatibility(**wide, attn_temperature=1e39), compatibility(**wide, attn_temperature=1e30)
    )
    with pytest.raises(ValueError, match="attn_temperature is 1e-309, expected .* that float64 holds"):
        compatibility(**wide, attn_temperature=1e-309)


@pytest.mark.parametrize("patches", [torch.ones(4, 7, 3), torch.ones(4, 3), torch.ones(4, 2, 3, 7)], ids=str)
def test_no_hint_without_a_dimension_that_fits(patches):
    with pytest.raises(ValueError, match="expected") as caught:
        compatibility(**_inputs(patches=patches))
    assert "patches." not in str(caught.value)
