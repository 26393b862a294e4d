"""Continue a run from a checkpoint, unless that is of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..weights import few
from .checkpoints import load_checkpoint, newest, step_of
from .identity import changes, check_agreement, differences, flag, refuse
from .run import Run


def restore(run: Run, path: Path) -> None:
    """Load a checkpoint. Raises ValueError for one of another run, model, or number of processes."""
    state = load_checkpoint(path)
    for name, mine in (("global_batch", run.global_batch), ("world", run.world)):
        if name in state and state[name] != mine:
            raise ValueError(f"resume: {path} is of a run with {name} {state[name]}, expected {mine}")
    if missing := {"state_dict", "optimizer", "step", "data", "global_batch", "world"} - state.keys():
        raise ValueError(f"resume: {path} has no {', '.join(sorted(missing))}, expected a checkpoint of pacl train")
    latest = newest(run.config.folder / "checkpoints")
    if latest is not None and step_of(latest) > state["step"]:
        raise ValueError(
            f"resume: {path} is of step {state['step']}, but --resume latest would take {latest}; delete the later "
            "checkpoints, or give the run another --name"
        )
    _check_identity(run, path, state)
    own = {name: (x.shape, x.dtype) for name, x in run.model.state_dict().items()}
    saved = {name: (x.shape, x.dtype) for name, x in state["state_dict"].items()}
    if own != saved:
        unlike = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        raise ValueError(
            f"resume: {path} is of a run with other parameters ({few(unlike)}), expected the same "
            "model, loss and learned parameters"
        )
    if (state.get("ema") is None) != (run.trainer.average is None):
        got, expected = ("without", "with") if run.trainer.average else ("with", "without")
        raise ValueError(f"resume: {path} is of a run {got} --ema-decay, expected one {expected} it")
    if run.trainer.average is not None:
        run.trainer.average.load_state_dict(state["ema"])
    run.model.load_state_dict(state["state_dict"])
    flags = [{k: x for k, x in group.items() if k != "params"} for group in run.trainer.optimiser.param_groups]
    run.trainer.optimiser.load_state_dict(state["optimizer"])
    for group, values in zip(run.trainer.optimiser.param_groups, flags, strict=True):
        group.update(values)  # learning rates and weight decay come from this run's flags
    run.step = run.saved = state["step"]
    run.states.restore(state["data"])
    run.data_state = state["data"][run.rank]
    # A checkpoint is written before the validation of its step.
    last = [run.log.last_result(run.step) or state.get("validated", {})]
    if run.group:  # the first process may write to the file before the others read it
        dist.broadcast_object_list(last, src=0, group=run.group)
    run.validated = last[0]
    check_agreement({"resume": f"step {run.step}"}, run.group)


def _check_identity(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run; record the flags that changed."""
    stored = state.get("run")
    if stored is None:
        run.say(f"warning: resume: {path} is of an earlier version, so towers, data and flags were not compared")
        return
    wrong = differences(stored, run.identity, run.towers) if run.rank == 0 else []
    refuse(f"resume: {path} is of another run: {'; '.join(wrong)}" if wrong else "", run.group)
    run.resumed = state.get("resumed", [])
    if changed := changes(stored, run.identity):
        run.resumed = [*run.resumed, {"step": state["step"], "changed": changed}]
        run.say("resume: " + ", ".join(f"{flag(k)} was {x['from']}, now {x['to']}" for k, x in changed.items()))
