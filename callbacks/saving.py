"""Averages in checkpoints: written by the module's own save hook, so that weights-only checkpoints have them too."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

import soups
from soups.averaging.checkpoint import KEY, SHARDED_PREFIX, VERSION, adopt_lightning, plain_name

from .sharding import any_sharded, gather, like, local, shard_of

if TYPE_CHECKING:
    from .session import Session


class Hook:
    """Stands in a module's `on_save_checkpoint` or `on_load_checkpoint` and calls the class's own as well.

    A copy or pickle of the module has the hook without the session, and behaves as if there were no callback.
    """

    def __init__(self, name: str, module: pl.LightningModule, session: Session) -> None:
        self.name = name
        self.module = module
        before = module.__dict__.get(name)
        self.before = before.before if isinstance(before, Hook) else before
        self.session: weakref.ref[Session] | None = weakref.ref(session)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Do what the hook does, with the session if there is one."""
        session = self.session() if self.session is not None else None
        if session is not None and self.name == "on_load_checkpoint":
            receive(session, checkpoint)
        if self.before is not None:
            self.before(checkpoint)
        else:
            getattr(type(self.module), self.name)(self.module, checkpoint)
        if session is not None and self.name == "on_save_checkpoint":
            add(session, checkpoint)

    @property
    def __code__(self) -> Any:
        # Lightning compares code objects to see whether a hook is overridden.
        return getattr(type(self.module), self.name).__code__

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "module": self.module, "before": self.before, "session": None}


def install(module: pl.LightningModule, session: Session) -> None:
    """Let the session take part in saving and loading of the module, until another one does."""
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        object.__setattr__(module, name, Hook(name, module, session))


# Saving -------------------------------------------------------------------------------------------------------------


def add(session: Session, checkpoint: dict[str, Any]) -> None:
    """Add the averages to a checkpoint, and see to it that `state_dict` holds the raw weights."""
    if session.swapped:
        raw, tied = session.raw(), session.tied()
        for key in list(checkpoint["state_dict"]):
            name = plain_name(key)
            name = tied.get(name, name)
            if name in raw:
                checkpoint["state_dict"][key] = raw[name].detach()
    if not session.begun or session.loaded is not None:
        # Something (a learning-rate finder) saves before training has begun, or the weights are those of a checkpoint that
        # was loaded to be tested: its averages belong to them.
        if session.loaded is not None and session.loaded["averages"]:
            checkpoint[KEY] = session.loaded
        return
    full = "optimizer_states" in checkpoint
    entries = {
        name: _entry(session, name, checkpoint, full=full)
        for name, tracked in session.tracked.items()
        if tracked.mean.count
    }
    checkpoint[KEY] = {
        "version": VERSION,
        "soups": soups.__version__,
        "step": session.steps,
        "epoch": session.epochs,
        "tied": session.tied(),
        "origins": {name: tracked.schedule.origin for name, tracked in session.tracked.items()},
        "averages": entries,
    }


def _entry(session: Session, name: str, checkpoint: dict[str, Any], *, full: bool) -> dict[str, Any]:
    tracked = session.tracked[name]
    state = tracked.mean.state_dict()
    planes: dict[str, dict[str, Tensor]] = state.pop("planes")
    if not full:
        planes = {"mean": planes["mean"]}
    entry: dict[str, Any] = {
        "kind": tracked.mean.kind,
        "count": tracked.mean.count,
        "last_point": tracked.last_point,
        "measured_at": tracked.measured_at,
        "buffers": dict(tracked.statistics),
    }
    originals = session.originals()
    if any_sharded(originals) and _distributed(session.trainer):
        # Tensors of a distributed checkpoint must be in `state_dict`: only that is saved shard by shard.
        for plane, tensors in planes.items():
            for key, tensor in tensors.items():
                checkpoint["state_dict"][f"{SHARDED_PREFIX}{name}/{plane}/{key}"] = like(tensor, originals[key])
        entry["planes"] = {
            plane: {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
            for plane, tensors in planes.items()
        }
        entry["weights"] = {}
    else:
        if any_sharded(originals):
            planes = {p: {key: gather(t, originals[key]) for key, t in ts.items()} for p, ts in planes.items()}
        entry["weights"] = planes["mean"]
    if full:
        entry["state"] = {**state, "planes": {} if "planes" in entry else planes}
    return entry


def _distributed(trainer: pl.Trainer) -> bool:
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


# Loading ------------------------------------------------------------------------------------------------------------


def receive(session: Session, checkpoint: dict[str, Any]) -> None:
    """Keep what a checkpoint holds until the averages are there; at once if they are (a learning-rate finder)."""
    adopt_lightning(checkpoint)
    content = checkpoint.get(KEY)
    if session.begun and not session._evaluating:
        session.restore(content or {"averages": {}, "step": 0, "epoch": 0})
    else:
        session.loaded = content if content is not None else {"averages": {}, "step": None}


def restore(session: Session, content: dict[str, Any]) -> None:
    """Give every average the state that a checkpoint holds for it; without one it starts anew, and says so."""
    session.steps = content["step"] if content["step"] is not None else session.trainer.global_step
    session.epochs = content.get("epoch", session.trainer.current_epoch)
    for name, tracked in session.tracked.items():
        entry = content["averages"].get(name)
        tracked.schedule.origin = content.get("origins", {}).get(name, tracked.schedule.origin)
        if entry is None:
            tracked.mean.count, tracked.last_point = 0, -1
            if content.get("step"):
                known = ", ".join(map(repr, content["averages"])) or "none"
                started = name in content.get("origins", {})
                if not started:
                    warnings.warn(
                        f"The checkpoint holds no average called {name!r} (it holds: {known}); it starts anew here.",
                        stacklevel=2,
                    )
            continue
        entry = whole_entry(entry, name, session)
        state = _state(session, name, entry)
        tracked.mean.load_state_dict(state)
        # What the checkpoint did not average (it was frozen, or `buffers` was another) joins with its present value.
        held = state["planes"]["mean"]
        for key, tensor in session.weights().items():
            if key not in held:
                tracked.mean.admit(key, tensor)
        tracked.last_point = int(entry.get("last_point", -1))
        tracked.measured_at = int(entry.get("measured_at", 0))
        tracked.statistics = {key: tensor.clone() for key, tensor in entry.get("buffers", {}).items()}


def _state(session: Session, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the state of one average, cut to this process's shards and to the tensors that are averaged."""
    mean = session.tracked[name].mean
    if entry["kind"] == "Lightning":
        entry = {**entry, "state": {"kind": mean.kind, "count": entry["count"], "planes": {"mean": entry["weights"]}}}
    # A tensor that is frozen now and was not when the checkpoint was written is still averaged.
    for tensors in (entry.get("state") or {}).get("planes", {}).values():
        for key in tensors:
            session.track_frozen(key)
    originals = session.originals()
    state = dict(
        entry.get("state") or {"kind": entry["kind"], "count": entry["count"], "planes": {"mean": entry["weights"]}}
    )
    known = {key: tensor for key, tensor in originals.items() if mean.covers(key)}
    state["planes"] = {
        plane: {key: shard_of(tensor, known[key]) for key, tensor in tensors.items() if key in known}
        for plane, tensors in state["planes"].items()
    }
    return state


def whole_entry(entry: dict[str, Any], name: str, session: Session) -> dict[str, Any]:
    """Return an entry with its tensors; those of a distributed checkpoint are read now, this process's shards only."""
    if "planes" not in entry:
        return entry
    from torch.distributed.checkpoint.state_dict_loader import load

    originals = session.originals() if session.begun else {}
    if not originals:
        from soups.averaging.swapping import slots

        originals = slots(session.module)
    wanted: dict[str, Tensor] = {}
    for plane, tensors in entry["planes"].items():
        for key, dtype in tensors.items():
            shard = torch.empty_like(local(originals[key]), dtype=getattr(torch, dtype), requires_grad=False)
            wanted[f"{SHARDED_PREFIX}{name}/{plane}/{key}"] = like(shard, originals[key])
    path = session.trainer.ckpt_path
    load({"state_dict": wanted}, checkpoint_id=Path(str(path)))
    planes: dict[str, dict[str, Tensor]] = {}
    for plane, tensors in entry["planes"].items():
        planes[plane] = {key: local(wanted[f"{SHARDED_PREFIX}{name}/{plane}/{key}"]) for key in tensors}
    whole = {key: value for key, value in entry.items() if key != "planes"}
    whole["weights"] = planes["mean"]
    if "state" in whole:
        whole["state"] = {**whole["state"], "planes": planes}
    return whole
