"""Averages in checkpoints: written by the module's own save hook, so that weights-only checkpoints have them too."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

import soups
from soups.averaging.checkpoint import SHARDED_PREFIX, VERSION, adopt_lightning
from soups.averaging.places import Places, find_places
from soups.averaging.swapping import slots
from soups.errors import WeightsError, did_you_mean
from soups.stores.averages import KEY

from .averaged_fit import AveragedFit
from .sharding import any_sharded, gather, like, local, shard_of


class Hook:
    """Stands in a module's `on_save_checkpoint` or `on_load_checkpoint` and calls the class's own as well.

    A copy or pickle of the module has the hook without the session, and behaves as if there were no callback.
    """

    def __init__(self, name: str, module: pl.LightningModule, session: AveragedFit) -> None:
        self.name = name
        self.module = module
        before = module.__dict__.get(name)
        self.before = before.before if isinstance(before, Hook) else before
        self.session: weakref.ref[AveragedFit] | None = weakref.ref(session)

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


def install(module: pl.LightningModule, session: AveragedFit) -> None:
    """Let the session take part in saving and loading of the module, until another one does."""
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        object.__setattr__(module, name, Hook(name, module, session))


# Saving -------------------------------------------------------------------------------------------------------------


def add(session: AveragedFit, checkpoint: dict[str, Any]) -> None:
    """Add the averages to a checkpoint, and see to it that `state_dict` holds the raw weights.

    Hooks of the module have run: keys of `state_dict` may be others than the module's, so they are learnt here.
    """
    session.follow()
    # Lightning's own averaging callback has put its average into `state_dict` and the raw weights elsewhere.
    state = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
    places = _places(session, state)
    if session.swapped:
        raw = session.raw()
        for key, name in places.names.items():
            if name in raw:
                state[key] = raw[name].detach().to(state[key].device, state[key].dtype)
    if not session.begun or session.loaded is not None:
        # Something (a learning-rate finder) saves before training has begun, or the weights are those of a checkpoint that
        # was loaded to be tested: its averages belong to them.
        if session.loaded is not None and session.loaded["averages"]:
            checkpoint[KEY] = session.loaded
        return
    full = "optimizer_states" in checkpoint
    entries = {
        name: _entry(session, name, checkpoint, places, full=full)
        for name, tracked in session.tracked.items()
        if tracked.mean.count
    }
    checkpoint[KEY] = {
        "version": VERSION,
        "soups": soups.__version__,
        "step": session.steps,
        "epoch": session.epochs,
        "tied": session.tied(),
        "places": places.names,
        "unknown": places.unknown,
        "strict": session.strict,
        "runs": {m.settings.name: run for m in session.averagers if (run := m.run_state()) is not None},
        "origins": {name: tracked.schedule.origin for name, tracked in session.tracked.items()},
        "averages": entries,
    }


def _places(session: AveragedFit, state: dict[str, Any]) -> Places:
    tensors = slots(session.module)
    if any_sharded(tensors):
        return find_places(state, tensors, by_name=True)
    places = find_places(state, tensors)
    # Lightning's ModelPruning saves the product of `x_orig` and `x_mask` as `x`.
    pruned = {f"{key}_orig" for key in places.unknown} & tensors.keys()
    names = {**places.names, **{key: f"{key}_orig" for key in places.unknown if f"{key}_orig" in pruned}}
    return Places(names, [key for key in places.unknown if f"{key}_orig" not in pruned])


def _masked(session: AveragedFit, planes: dict[str, Tensor], places: Places) -> dict[str, Tensor]:
    """Return averages of pruned parameters, with the mask that their saved form has."""
    tensors = slots(session.module)
    return {
        name: planes[name] * tensors[mask].to(planes[name])
        for key, name in places.names.items()
        if name == f"{key}_orig" and name in planes and (mask := f"{key}_mask") in tensors
    }


def _entry(
    session: AveragedFit, name: str, checkpoint: dict[str, Any], places: Places, *, full: bool
) -> dict[str, Any]:
    session.check_finite(name)
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
    if masked := _masked(session, planes["mean"], places):
        entry["saved"] = masked
    if full and tracked.before_last is not None and not any_sharded(originals):
        entry["undo"] = {"step": tracked.last_point, **tracked.before_last}
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
    return bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


def portable(session: AveragedFit) -> dict[str, Any]:
    """Return a weights-only checkpoint of the module and its averages, on the CPU. Every process must call this."""
    checkpoint: dict[str, Any] = {"state_dict": session.module.state_dict()}
    add(session, checkpoint)
    return move_data_to_device(checkpoint, "cpu")


# Loading ------------------------------------------------------------------------------------------------------------


def receive(session: AveragedFit, checkpoint: dict[str, Any]) -> None:
    """Keep what a checkpoint holds until the averages are there; at once if they are (a learning-rate finder)."""
    owner: Any = session.trainer
    theirs = any(kind.__name__ == "WeightAveraging" for item in owner.callbacks for kind in type(item).__mro__)
    if not theirs:  # beside Lightning's own callback its part of the checkpoint is its own to read
        adopt_lightning(checkpoint)
    content = checkpoint.get(KEY)
    if session.begun and not session.evaluating:
        restore(session, content or {"averages": {}, "step": 0, "epoch": 0})
    else:
        session.loaded = content if content is not None else {"averages": {}, "step": None}


def restore(session: AveragedFit, content: dict[str, Any]) -> None:
    """Give every average the state that a checkpoint holds for it; without one it starts anew, and says so."""
    session.steps = content["step"] if content["step"] is not None else session.trainer.global_step
    session.epochs = content.get("epoch", session.trainer.current_epoch)
    for name, tracked in session.tracked.items():
        entry = content["averages"].get(name)
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
        tracked.schedule.origin = content.get("origins", {}).get(name, tracked.schedule.origin)
        tracked.mean.load_state_dict(state)
        # What the checkpoint did not average (it was frozen, or `buffers` was another) joins with its present value.
        held = state["planes"]["mean"]
        for key, tensor in session.weights().items():
            if key not in held:
                tracked.mean.admit(key, tensor)
        tracked.last_point = int(entry.get("last_point", -1))
        _undo_last(session, name, entry)
        tracked.measured_at = int(entry.get("measured_at", 0))
        tracked.statistics = {key: tensor.clone() for key, tensor in entry.get("buffers", {}).items()}


def _undo_last(session: AveragedFit, name: str, entry: dict[str, Any]) -> None:
    """Take back a last point that only the end of a shorter run had brought in."""
    undo, tracked = entry.get("undo"), session.tracked[name]
    if undo is None or undo["step"] != tracked.last_point:
        return
    known = {key for key in session.tensors.cells if tracked.mean.covers(key)}
    complete = all(known <= tensors.keys() for tensors in undo["planes"].values())
    if session.plan.steps != undo["step"] and complete:
        tracked.mean.undo(undo)
        tracked.last_point = -1
    else:
        tracked.before_last = {key: value for key, value in undo.items() if key != "step"}


def _renamed(names: Iterable[str], known: Collection[str], average: str) -> dict[str, str]:
    """Return the module's names of an average's tensors; a pruned parameter's is that of the plain one.

    Tensors that the module does not have are left out, and a warning names them.
    """
    found: dict[str, str] = {}
    lost: list[str] = []
    for name in names:
        plain = name.removesuffix("_orig")
        if name in known or plain in known:
            found[name] = name if name in known else plain
        else:
            lost.append(name)
    if lost:
        warnings.warn(
            f"The average {average!r} in the checkpoint holds {lost[0]!r} ({len(lost)} such tensors), which the module does "
            f"not have now; they are left out. Add the same layers before the fit if they are to go on.",
            stacklevel=2,
        )
    return found


def _state(session: AveragedFit, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the state of one average, cut to this process's shards and to the tensors that are averaged."""
    mean = session.tracked[name].mean
    if entry["kind"] == "Lightning":
        entry = {**entry, "state": {"kind": mean.kind, "count": entry["count"], "planes": {"mean": entry["weights"]}}}
    # A tensor that is frozen now and was not when the checkpoint was written is still averaged.
    for key in entry["weights"]:
        if key in session.tensors.frozen:
            session.tensors.thaw(key)
    originals = session.originals()
    state = dict(
        entry.get("state") or {"kind": entry["kind"], "count": entry["count"], "planes": {"mean": entry["weights"]}}
    )
    names = _renamed(entry["weights"], originals, name)
    state["planes"] = {
        plane: {
            names[key]: shard_of(tensor, originals[names[key]])
            for key, tensor in tensors.items()
            if key in names and mean.covers(names[key])
        }
        for plane, tensors in state["planes"].items()
    }
    return state


def whole_entry(entry: dict[str, Any], name: str, session: AveragedFit) -> dict[str, Any]:
    """Return an entry with its tensors; those of a distributed checkpoint are read now, this process's shards only."""
    if "planes" not in entry:
        return entry
    from torch.distributed.checkpoint.state_dict_loader import load

    originals = session.originals() if session.begun else slots(session.module)
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


def for_module(session: AveragedFit, name: str, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Return a loaded average's tensors by the names of the module that is evaluated, this process's shards.

    Raises:
        WeightsError: the module lacks a tensor of the average, or has it in another shape.
    """
    originals = slots(session.module)
    tied = session.tied()
    merged = {**entry["weights"], **entry.get("buffers", {}), **entry.get("saved", {})}
    value: dict[str, Tensor] = {}
    for key, tensor in merged.items():
        home = next((n for n in (key, tied.get(key, key), key.removesuffix("_orig")) if n in originals), None)
        if home is None:
            raise WeightsError(
                f"The average {name!r} in the checkpoint holds {key!r}, which {type(session.module).__name__} does not have: "
                f"{did_you_mean(key, originals)} Build the module as it was when the checkpoint was written."
            )
        shard = shard_of(tensor, originals[home])
        if shard.shape != local(originals[home]).shape:
            raise WeightsError(
                f"{key!r} of the average {name!r} has shape {tuple(shard.shape)} and the module's is "
                f"{tuple(originals[home].shape)}. Build the module as it was when the checkpoint was written."
            )
        value[home] = shard
    return value
