"""The native module refuses malformed calls, which the backend itself never makes."""

import pytest
import torch

from pacl_kernels.native import native


@pytest.fixture
def tensors() -> dict:
    return dict(patches=torch.randn(2, 3, 4), texts=torch.randn(2, 4), phi=torch.empty(2, 2), state=torch.empty(2, 2))


@pytest.fixture
def fields(cpu_backend, tensors) -> dict:
    """Return the fields of a `CompatibilityParams` for B = 2, N = 3, K = 2, D = 4."""
    return dict(
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        images=2,
        patches_per_image=3,
        text_count=2,
        dim=4,
        dtype="float32",
        form="dot",
        temperature=1.0,
        threads=1,
        openmp=(0, 0, 0),
        patch_strides=(12, 4, 1),
        text_strides=(4, 1),
    )


def test_planned_call(fields, tensors):
    """A plan runs any number of times, in any workspace that is large enough."""
    call = native().compatibility_forward(native().CompatibilityParams(**fields))
    answers = []
    for more in (0, 100):
        workspace = torch.empty(call.workspace_bytes + more, dtype=torch.uint8)
        call.run(workspace.data_ptr(), workspace.numel())
        answers.append(tensors["phi"].clone())
        tensors["phi"].fill_(torch.nan)
    assert torch.equal(*answers) and answers[0].isfinite().all()


def test_a_workspace_that_is_too_small(fields):
    call = native().compatibility_forward(native().CompatibilityParams(**fields))
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"workspace has {len(workspace) - 1} bytes, expected {len(workspace)}$"):
        call.run(workspace.data_ptr(), len(workspace) - 1)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"patch": 0}, TypeError, "CompatibilityParams has no field 'patch', expected some of images, .*grad_phi"),
        ({"patches": None}, TypeError, "CompatibilityParams.patches is None, expected an address"),
        ({"images": "two"}, TypeError, "CompatibilityParams.images is 'two', expected an integer"),
        ({"temperature": ()}, TypeError, r"CompatibilityParams.temperature is \(\), expected a number"),
        ({"patch_strides": (1, 2)}, TypeError, r"patch_strides is \(1, 2\), expected 3 integers"),
        ({"dtype": "float64"}, ValueError, "dtype is 'float64', expected float32, bfloat16 or float16"),
        ({"form": "mean"}, ValueError, "form is 'mean', expected dot, cosine or max"),
    ],
)
def test_a_field_that_does_not_fit(changes, error, message, fields):
    with pytest.raises(error, match=message) as caught:
        native().CompatibilityParams(**fields | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["images", "dtype", "openmp", "patches", "text_strides", "state"])
def test_a_field_that_is_missing(name, fields):
    del fields[name]
    with pytest.raises(TypeError, match=f"CompatibilityParams needs '{name}', which is missing"):
        native().CompatibilityParams(**fields)


def test_a_backward_without_what_it_needs(fields):
    params = native().CompatibilityParams(**fields)
    with pytest.raises(ValueError, match="grad_phi is missing"):
        native().compatibility_backward(params)
    params.set(grad_phi=fields["phi"], grad_texts=fields["texts"])
    with pytest.raises(ValueError, match="texts_sum is missing"):
        native().compatibility_backward(params)
    with pytest.raises(TypeError, match="has no field 'grad_text'"):
        params.set(grad_text=0)
