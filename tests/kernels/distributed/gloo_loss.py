"""The loss of many processes equals that of one process with the whole batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate, evaluate, natural_sizes
from problems import DIFFERENTIABLE, FORMS, Case, Problem, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pacl_kernels import PaclLoss, available_backends, distributed, fused_pacl_loss
from pacl_kernels.autograd import Options
from pacl_kernels.checks import Inputs
from pacl_kernels.distributed import global_loss

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EXCHANGES = ("gather", "ring")


def local_rows(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def local_part(problem: Problem, rows: slice) -> Problem:
    mask = problem.patch_mask
    return replace(
        problem,
        patches=problem.patches[rows],
        texts=problem.texts[rows],
        patch_mask=None if mask is None else mask[rows],
    )


def answer(problem: Problem, needs=DIFFERENTIABLE, **options) -> dict[str, Tensor]:
    """Return the loss and the gradients of `needs`."""
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_(name in needs) for name in DIFFERENTIABLE}
    p = replace(problem, **leaves)
    value = fused_pacl_loss(
        *(p.patches, p.texts, p.logit_scale), logit_bias=p.logit_bias, loss=p.objective, **p.options(), **options
    )
    value.backward()
    return {"value": value.detach(), **{name: leaves[name].grad for name in needs}}


def shares(answer: dict[str, Tensor], rows: slice, world: int) -> dict[str, Tensor]:
    """Return the gradients that one process should get; those of its patches and texts are multiplied by `world`."""
    return {name: x[rows] * world if name in ("patches", "texts") else x for name, x in answer.items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, sizes: dict[str, float]):
    for name, x in expected.items():
        error = (got[name] - x).norm() / max(x.norm().item(), 1e-2 * sizes[name])
        assert error <= tolerance, f"{name}: error {error:.3g}, allowed {tolerance}"
        assert got[name].dtype == x.dtype and got[name].is_contiguous()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, "random"])
def test_equals_one_process(form, loss, exchange, dtype, mask, sizes, group):
    rank, world = group.rank(), group.size()
    problem = make(Case(sum(sizes), 7, 33, mask=mask), form, loss, dtype)
    rows = local_rows(sizes, rank)
    got = answer(local_part(problem, rows), group=group, exchange=exchange)
    assert_close(got, shares(answer(problem), rows, world), TOLERANCE[dtype], natural_sizes(problem))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize(
    "data, scale, tau", [("related", 600.0, 0.01), ("aligned", 100.0, 1.0), ("norms", 100.0, 10.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_reference(data, scale, tau, loss, exchange, dtype, sizes, group):
    """The answer stays within the tolerance of one process, also for saturated losses and large scales."""
    world, rows = group.size(), local_rows(sizes, group.rank())
    problem = make(Case(sum(sizes), 5, 65, tau=tau, scale=scale, data=data), "dot", loss, dtype)
    truth = evaluate(problem.to(torch.float64), "reference")
    plain = evaluate(problem.to(torch.float32), "reference")
    got, natural = answer(local_part(problem, rows), group=group, exchange=exchange), natural_sizes(problem)
    for name, x in shares(truth, rows, world).items():
        size = natural[name] * (world if name in ("patches", "texts") else 1)
        assert_accurate(name, got[name], x, dtype, shares(plain, rows, world)[name], size)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bits_are_the_same_on_every_run_and_rank(exchange, sizes, group):
    problem = local_part(make(Case(sum(sizes), 7, 33), "cosine", "infonce"), local_rows(sizes, group.rank()))
    first, second = (answer(problem, group=group, exchange=exchange) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    everyone = [None] * group.size()
    scalars = {name: first[name] for name in ("value", "logit_scale", "logit_bias", "attn_temperature")}
    dist.all_gather_object(everyone, scalars)
    for other in everyone:
        assert all(torch.equal(x, other[name]) for name, x in scalars.items())


@pytest.mark.parametrize("exchange, collective", [("gather", "all_reduce"), ("ring", "all_to_all_single")])
def test_gradients_of_texts_travel_in_float32(exchange, collective, group):
    """The gradients are sent in float32 for texts of any dtype, because every process adds to them."""
    world = group.size()
    if world == 1:
        pytest.skip("nothing travels")
    rows = local_rows([3] * world, group.rank())
    problem = local_part(make(Case(3 * world, 5, 8), "dot", "infonce", torch.bfloat16), rows)
    with Traffic() as traffic:
        got = answer(problem, group=group, exchange=exchange)
    assert got["texts"].dtype == torch.bfloat16
    dtypes = {dtype for name, shape, dtype in traffic.typed if name == collective and shape[-1] == 8}
    assert torch.float32 in dtypes and (exchange == "ring" or torch.bfloat16 not in dtypes)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_batches_that_grow_and_shrink(exchange, group):
    """The loss is right after the local batch changes, in some processes or in all."""
    world, rank = group.size(), group.rank()
    for step, sizes in enumerate(([2, 3, 1, 2], [1, 1, 1, 2], [2, 1, 1, 1], [7, 6, 9, 5], [7, 1, 9, 1])):
        sizes = sizes[:world]
        problem = make(Case(sum(sizes), 4, 11, tau=0.3 + step), "dot", "infonce", torch.float64)
        rows = local_rows(sizes, rank)
        got = answer(local_part(problem, rows), group=group, exchange=exchange)
        assert_close(got, shares(answer(problem), rows, world), 1e-10, natural_sizes(problem))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_collectives_of_one_process(exchange, group):
    """A group of one process needs no collectives; with them the answer is the same, also inside a checkpoint."""
    if group.size() > 1:
        pytest.skip("of one process")
    problem = make(Case(5, 7, 33), "cosine", "infonce", torch.float64)
    leaves = [getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE]
    patches, texts, scale, bias, tau = leaves
    options = Options(problem.form, problem.objective, "torch")
    for function in (global_loss, partial(checkpoint, global_loss, use_reentrant=False)):
        with Traffic() as traffic:
            value = function(Inputs(patches, texts, None, tau), scale, bias, options, group, exchange)
            grads = torch.autograd.grad(value, leaves)
        assert ("all_reduce", (7,)) in traffic.sent
        got = {"value": value.detach(), **dict(zip(DIFFERENTIABLE, grads, strict=True))}
        assert_close(got, answer(problem, group=group), 1e-10, natural_sizes(problem))


def test_numbers_of_one_process_change_when_compiled(group):
    """A compiled loss takes a new scale on each call; the compiler makes a symbol of a number at its second value."""
    if group.size() > 1:
        pytest.skip("of one process")
    problem = make(Case(3, 4, 11), "dot", "infonce")

    options = Options("dot", "infonce", "torch")

    def function(scale):
        return global_loss(Inputs(problem.patches, problem.texts, None, 0.1), scale, None, options, group, "gather")

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for scale in (10.0, 11.0, 12.0):
        assert compiled(scale).item() == pytest.approx(function(scale).item(), rel=1e-6)


def test_numbers_and_one_element_tensors(group):
    """A scalar may be a number or a tensor of shape [] or [1]; its gradient has the same shape and dtype."""
    problem = make(Case(2 * group.size(), 4, 11), "dot", "sigmoid", torch.float64)
    expected = answer(problem)
    rows = local_rows([2] * group.size(), group.rank())
    mine = local_part(problem, rows)
    inputs = {"attn_temperature": 0.1, "logit_bias": -0.7, "loss": "sigmoid", "group": group}
    assert fused_pacl_loss(mine.patches, mine.texts, 10.0, **inputs) == pytest.approx(
        expected["value"].item(), rel=1e-9
    )
    scale = torch.tensor([10.0], requires_grad=True)
    fused_pacl_loss(mine.patches, mine.texts, scale, **inputs).backward()
    assert scale.grad.shape == (1,) and scale.grad.dtype == torch.float32
    assert scale.grad.item() == pytest.approx(expected["logit_scale"].item(), rel=1e-5)


class Traffic(TorchDispatchMode):
    """Collect (collective, shape, dtype) of each tensor that is sent."""

    def __init__(self):
        super().__init__()
        self.typed: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    @property
    def sent(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, shape) for name, shape, _ in self.typed]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("_c10d_functional::") and "wait" not in name:
            self.typed.append((name.removeprefix("_c10d_functional::"), tuple(args[0].shape), args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [DIFFERENTIABLE, ("patches",)], ids=["all", "frozen"])
def test_what_travels(needs, group):
    """Processes send texts, one sum per column, scalars and the texts' gradient, but no gradient of frozen texts."""
    world = group.size()
    if world == 1:
        pytest.skip("nothing travels")
    problem = local_part(make(Case(3 * world, 50, 8), "dot", "infonce"), local_rows([3] * world, group.rank()))
    answer(problem, needs, group=group, exchange="gather")  # the first call also sends what processes agree on
    with Traffic() as traffic:
        answer(problem, needs, group=group, exchange="gather")
    expected = [("all_gather_into_tensor", (24,)), ("all_gather_into_tensor", (3, 8)), ("all_reduce", (3 * world + 2,))]
    if "texts" in needs:
        expected += [("all_reduce", (3 * world, 8)), ("all_reduce", (3,))]  # Gloo has no reduce-scatter
    assert traffic.sent == expected
    answer(problem, needs, group=group, exchange="ring")
    with Traffic() as traffic:
        answer(problem, needs, group=group, exchange="ring")
    hops = 2 * (world - 1) + (world if "texts" in needs else 0)
    assert traffic.sent.count(("all_to_all_single", (3, 8))) == hops
    assert max(torch.Size(shape).numel() for _, shape in traffic.sent) == 3 * 8


def test_automatic_choice(group, monkeypatch):
    """All processes choose the ring if memory that grows with the global batch is too large, for any local batch."""
    world, rank = group.size(), group.rank()
    sizes = [4, 2, 3, 1][:world]
    problem = local_part(make(Case(sum(sizes), 5, 8), "dot", "infonce"), local_rows(sizes, rank))
    for limit, collective in (
        (2**30, "all_gather_into_tensor"),
        (world * 4 * (8 * 12 + 16 * 4) - 1, "all_to_all_single"),
    ):
        monkeypatch.setattr("pacl_kernels.distributed.agreement.GATHER_BYTES", limit)
        with Traffic() as traffic:
            answer(problem, group=group)
        assert world == 1 or (collective, (4, 8)) in traffic.sent


def test_groups_of_some_processes(group):
    """A group of some processes has its own batch; the others compute alone, although a default group exists."""
    world, rank = group.size(), group.rank()
    if world < 3:
        pytest.skip("needs processes outside the group")
    some = dist.new_group([1, 2])
    problem = make(Case(2 * world, 5, 8), "dot", "infonce", torch.float64)
    mine = local_part(problem, local_rows([2] * world, rank))
    alone = answer(mine)
    if rank in (1, 2):
        got, whole = answer(mine, group=some), local_part(problem, slice(2, 6))
        assert_close(got, shares(answer(whole), slice(2 * rank - 2, 2 * rank), 2), 1e-10, natural_sizes(whole))
    else:
        assert torch.equal(answer(mine, group=None)["value"], alone["value"])
        with pytest.raises(
            TypeError, match="group is a .*expected a torch.distributed process group with this process"
        ):
            answer(mine, group=some)
    dist.barrier()


DIFFERENCES = [
    ("form", {"form": ["dot", "cosine"]}),
    ("loss", {"loss": ["infonce", "sigmoid"]}),
    ("exchange", {"exchange": ["ring", "gather"]}),
    ("attn_temperature", {"attn_temperature": [0.1, 0.2]}),
    ("attn_temperature", {"attn_temperature": [0.1, torch.tensor(0.1)]}),
    ("logit_scale", {"logit_scale": [10.0, 11.0]}),
    ("logit_bias", {"logit_bias": [None, 0.5]}),
    ("D", {"patches": [torch.ones(2, 3, 5), torch.ones(2, 3, 6)], "texts": [torch.ones(2, 5), torch.ones(2, 6)]}),
    ("dtype", {name: [x, x.double()] for name, x in (("patches", torch.ones(2, 3, 5)), ("texts", torch.ones(2, 5)))}),
    ("texts.requires_grad", {"texts": [torch.ones(2, 5), torch.ones(2, 5, requires_grad=True)]}),
]


@pytest.mark.parametrize("name, changes", DIFFERENCES, ids=lambda x: x if isinstance(x, str) else "")
def test_processes_that_differ(name, changes, group):
    """If arguments differ between processes, every process raises an error that names them; the next step works."""
    rank, last = group.rank(), group.size() - 1
    if last == 0:
        pytest.skip("one process agrees with itself")
    arguments = {
        "patches": torch.ones(2, 3, 5),
        "texts": torch.ones(2, 5),
        "logit_scale": 10.0,
        "attn_temperature": 0.1,
    }
    arguments |= {argument: values[rank == last] for argument, values in changes.items()}
    with pytest.raises(
        ValueError, match=f"{name} is .* on rank 0 of the group and .* on rank {last}, expected the same"
    ):
        fused_pacl_loss(**arguments, group=group)
    same = {argument: values[0] for argument, values in changes.items()}
    assert fused_pacl_loss(**(arguments | same), group=group).isfinite()


def test_without_reading_what_others_say(group, monkeypatch):
    """The first step on a GPU fixes the largest local batch; later batches may be smaller, and numbers may change."""
    world, rank = group.size(), group.rank()
    if world == 1:
        pytest.skip("one process agrees with itself")
    monkeypatch.setattr("pacl_kernels.distributed.agreement.may_read", lambda device: False)

    def check(sizes, scale):
        problem = make(Case(sum(sizes), 4, 11), "dot", "infonce", torch.float64)
        mine = local_part(problem, local_rows(sizes, rank))
        inputs = {"attn_temperature": 0.2, "group": group}
        got = fused_pacl_loss(mine.patches, mine.texts, scale, **inputs)
        expected = fused_pacl_loss(problem.patches, problem.texts, scale, attn_temperature=0.2)
        assert got.item() == pytest.approx(expected.item(), rel=1e-10)

    check([3, 4, 2, 1][:world], 10.0)
    check([1, 2, 2, 1][:world], 10.0)
    check([1, 4, 2, 2][:world], 11.0)
    with pytest.raises(ValueError, match="texts has 5 rows, expected at most 4, the largest local batch of the first"):
        check([5] * world, 10.0)
    distributed.forget(group)
    check([5] * world, 10.0)
    with pytest.raises(ValueError, match=f"form is .* on rank 0 of the group and .* on rank {world - 1}"):
        form = "cosine" if rank == world - 1 else "max"
        fused_pacl_loss(torch.ones(2, 3, 11), torch.ones(2, 11), 10.0, form=form, group=group)


def test_nan_reaches_every_process(sizes, group):
    problem = make(Case(sum(sizes), 4, 11), "dot", "infonce")
    problem.patches[-1, 0, 0] = float("nan")
    mine = local_part(problem, local_rows(sizes, group.rank()))
    for exchange in EXCHANGES:
        assert answer(mine, group=group, exchange=exchange)["value"].isnan()


def test_number_of_patches_may_differ(group):
    """Processes may have different numbers of patches N."""
    world, rank = group.size(), group.rank()
    problem = make(Case(2 * world, 4, 11, mask="random"), "dot", "infonce", torch.float64)
    mine = local_part(problem, local_rows([2] * world, rank))
    padding = torch.zeros(2, rank, 11, dtype=torch.float64)
    longer = replace(
        mine,
        patches=torch.cat([mine.patches, padding + float("nan")], 1),
        patch_mask=torch.cat([mine.patch_mask, padding[..., 0].bool()], 1),
    )
    assert_close(
        {"value": answer(longer, group=group)["value"]}, {"value": answer(problem)["value"]}, 1e-10, {"value": 1}
    )


@pytest.mark.parametrize("loss, exchange", [("infonce", "gather"), ("sigmoid", "ring")])
def test_compiles(loss, exchange, group):
    world, rank = group.size(), group.rank()
    problem = make(Case(3 * world, 5, 9), "dot", loss)
    mine = local_part(problem, local_rows([3] * world, rank))

    def function(patches, texts, scale, bias, tau):
        options = {"loss": loss, "exchange": exchange, "group": group}
        return fused_pacl_loss(patches, texts, scale, logit_bias=bias, attn_temperature=tau, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = {name: getattr(mine, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    value = compiled(*leaves.values())
    value.backward()
    got = {"value": value.detach(), **{name: x.grad for name, x in leaves.items()}}
    assert_close(got, answer(mine, group=group, exchange=exchange), 1e-5, natural_sizes(problem))


@pytest.mark.parametrize("exchange, dtype", [("gather", torch.bfloat16), ("ring", torch.float32)], ids=str)
def test_triton_kernels(exchange, dtype, sizes, group):
    """The Triton kernels, run in the interpreter, give the answer of one process."""
    if available_backends()["triton"] is not None:
        pytest.skip(available_backends()["triton"])
    problem, rows = make(Case(sum(sizes), 5, 17), "dot", "infonce", dtype), local_rows(sizes, group.rank())
    got = answer(local_part(problem, rows), group=group, exchange=exchange, backend="triton")
    expected = shares(answer(problem, backend="triton"), rows, group.size())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(got, expected, tolerance, natural_sizes(problem))


def test_module_with_the_arguments_of_open_clip(group):
    world, rank = group.size(), group.rank()
    problem = make(Case(2 * world, 5, 9), "dot", "infonce", torch.float64)
    mine = local_part(problem, local_rows([2] * world, rank))
    expected = fused_pacl_loss(mine.patches, mine.texts, 10.0, group=group)
    assert torch.equal(PaclLoss(rank=rank, world_size=world, group=group)(mine.patches, mine.texts, 10.0), expected)
    if world > 1:
        assert torch.equal(PaclLoss(rank=rank, world_size=world)(mine.patches, mine.texts, 10.0), expected)
        with pytest.raises(ValueError, match=f"world_size {world + 1}, expected {rank} and {world} as in the group"):
            PaclLoss(rank=rank, world_size=world + 1)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("columns", [1, 2])
def test_ring_in_blocks(loss, columns, sizes, group, monkeypatch):
    """The ring handles fewer texts at a time than a process sends if their scores would be too large."""
    problem, rows = make(Case(sum(sizes), 5, 9), "cosine", loss, torch.float64), local_rows(sizes, group.rank())
    monkeypatch.setattr("pacl_kernels.distributed.ring.RING_BYTES", 16 * sizes[group.rank()] * columns)
    got = answer(local_part(problem, rows), group=group, exchange="ring")
    assert_close(got, shares(answer(problem), rows, group.size()), 1e-10, natural_sizes(problem))
