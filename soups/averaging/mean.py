"""The one interface of all averages, and the single pass over the weights that updates several of them.

The pass is cut into groups of about 2¹⁷ elements: a group's weights are read from memory once and stay in the cache
while every average takes them in, so that K averages move (1 + 2K)/3 of the bytes of one. Lists of views are built once and kept for as
long as the weights stay where they are. No temporary is ever larger than a group.
"""

# torch's foreach functions carry an underscore but are what torch.optim itself is made of.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from soups.averaging.fusing import flat_view, lerp_together
from soups.averaging.offload import Offload
from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.weights import Weights, is_averaged, tied_names

# Elements in a group: 512 KiB of float32 weights beside one average's, well inside a core's second-level cache.
GROUP = 1 << 17
# What reads each weight once gains nothing from the cache; larger groups save calls.
GROUP_ONCE = 1 << 23
# Tensors up to this many elements are first copied side by side, so that a group of them costs one operation an average.
SMALL = 1 << 13
# Elsewhere (CUDA) one foreach call is one kernel, and a group only bounds the temporary of a conversion: 64 MiB.
GROUP_ELSEWHERE = 1 << 24

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def storage_dtype(weight: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which an average of `weight` tensors is kept: float32, or what was asked for, or wider."""
    if weight.is_complex or weight == torch.float64:
        return weight
    return asked or torch.float32


class MeanOptions(TypedDict, total=False):
    """Keyword arguments that every average takes.

    Attributes:
        dtype: dtype of the kept tensors; float32 when None. In bfloat16 updates are rounded stochastically, so that
            small steps are not lost. float64 weights are always averaged in float64.
        device: device of the kept tensors; that of the weights when None.
        seed: seed of the stochastic rounding.
        background: take points in by a thread, from a copy of the weights, while training goes on. When None, only for
            averages on the CPU of weights that are elsewhere. The result is the same to the last bit.
        fused: on CPU, update with a compiled kernel, together with all other fused averages of a pass: see `fusing`.
            Needs a C++ compiler. Its last bits are not those of the plain update, and as reproducible. Elsewhere torch's
            own kernels take many tensors at once already, and it changes nothing.
        covers: which tensors take part, by name; all floating ones when None.
    """

    dtype: torch.dtype | str | None
    device: torch.device | str | None
    seed: int
    background: bool | None
    fused: bool
    covers: Callable[[str], bool] | None


class Mean(ABC):
    """An average of weights over time, updated in place.

    Averages start without any weights: the first `update` allocates. `state_dict` and `load_state_dict` save and
    restore exactly, so that a resumed run gives the same bits.

    Args:
        **keep: what is kept, where and how; see `MeanOptions`.
    """

    kind: str = "mean"
    # Whether an update goes over a group more than once, so that it had better stay in the cache.
    revisits: bool = True

    def __init__(self, **keep: Unpack[MeanOptions]) -> None:
        if unknown := keep.keys() - MeanOptions.__annotations__.keys():
            name = min(unknown)
            raise ConfigError(f"There is no option {name!r}: {did_you_mean(name, MeanOptions.__annotations__)}")
        dtype, device = keep.get("dtype"), keep.get("device")
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
            dtype = DTYPES[dtype]
        if dtype == torch.float16:
            raise ConfigError(
                "An average in float16 overflows or stands still without warning. Use dtype='float32' (the default), "
                "or 'bfloat16', which is rounded stochastically."
            )
        self.dtype = dtype
        self.device = None if device is None else torch.device(device)
        self.seed = keep.get("seed", 0)
        self.background = keep.get("background")
        self.fused = keep.get("fused", False)
        self.count = 0
        # `count` as it was before the update that is being made, perhaps in the background.
        self._before = 0
        self._covers = keep.get("covers")
        # What is kept, by plane ("mean", "ring0", ...) and tensor name.
        self._planes: dict[str, dict[str, Tensor]] = {}
        # For each group of the current pass: for each plane, views of the group's tensors; None where not covered.
        self._views: list[dict[str, list[Tensor]] | None] = []
        self._pass: Pass | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._settle()  # copies and pickles are of a finished update, and make views of their own
        return {**self.__dict__, "_pass": None, "_views": []}

    # What a concrete average says of itself -----------------------------------------------------------------------

    @abstractmethod
    def _begin(self) -> None:
        """Compute the numbers of this update, once for all groups."""

    @abstractmethod
    def _apply(self, index: int, views: dict[str, list[Tensor]], theta: list[Tensor]) -> None:
        """Take in one group: `views` by plane, `theta` the weights in this average's dtype and device."""

    def _planes_needed(self) -> Sequence[str]:
        """Name the planes that must exist before the next `_apply`."""
        return ("mean",)

    def _fused_weight(self, index: int) -> Tensor | None:
        """Return w if this update of a group is a ← a + w (θ - a) on the plane "mean" and is to be fused; else None."""
        return None

    def _stale(self) -> bool:
        """Tell whether a plane is missing that the next update needs."""
        return False

    def _plane_dtype(self, plane: str) -> torch.dtype | None:
        return self.dtype

    def _stored_dtype(self, weight: torch.dtype, plane: str) -> torch.dtype:
        """Return the dtype in which a plane keeps tensors of weights of dtype `weight`."""
        return storage_dtype(weight, self._plane_dtype(plane))

    def _plane_device(self, plane: str) -> torch.device | None:
        return self.device

    def _scalars(self) -> dict[str, Any]:
        """Return what the state holds beside `count` and the tensors."""
        return {}

    def _load_scalars(self, scalars: Mapping[str, Any]) -> None:
        pass

    def _settle(self) -> None:
        """Wait for an update in the background."""
        if self._pass is not None:
            self._pass.settle()

    def _behind(self, weight: Tensor) -> bool:
        """Tell whether points of `weight` are taken in in the background."""
        if self.background is not None:
            return self.background
        return self.device is not None and self.device.type == "cpu" and weight.device.type != "cpu"

    # For everyone -------------------------------------------------------------------------------------------------

    def covers(self, name: str) -> bool:
        """Tell whether the tensor called `name` takes part."""
        return self._covers is None or self._covers(name)

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Take in the weights as they are now.

        Integer and bool tensors are left out; of tied tensors the first name is kept.

        Args:
            weights: name to tensor; any float or complex dtype, any shape.

        Raises:
            WeightsError: the names or shapes are not those of the updates before.
        """
        update([self], weights)

    def value(self) -> dict[str, Tensor]:
        """Return the average: name to tensor, in the kept dtype. The tensors are the average's own, not copies.

        Raises:
            WeightsError: nothing has been averaged yet.
        """
        if self.count == 0:
            raise WeightsError(f"The {self.kind} average holds nothing yet: no update was made. Was its start reached?")
        self._settle()
        return self._planes["mean"]

    @torch.no_grad()
    def admit(self, name: str, tensor: Tensor) -> None:
        """Let a tensor join that was constant until now (a parameter that is about to be unfrozen).

        The average of a constant is the constant, so this is exact.
        """
        self._settle()
        if self.count and self.covers(name):
            for plane, tensors in self._planes.items():
                tensors[name] = self._like(tensor, plane).copy_(tensor)
            self._pass = None

    def follow(self, renamed: Mapping[str, str], joined: Weights, gone: Sequence[str]) -> None:
        """Go on with a module whose tensors have changed.

        Args:
            renamed: old name to new name; these keep their average.
            joined: tensors that are new, or new under an old name; their average begins at the present value.
            gone: names that are forgotten.
        """
        self._settle()
        for tensors in self._planes.values():
            moved = {new: tensors.pop(old) for old, new in renamed.items() if old in tensors}
            for name in gone:
                tensors.pop(name, None)
            tensors.update(moved)
        self._pass = None
        for name, tensor in joined.items():
            self.admit(name, tensor)

    @torch.no_grad()
    def zero(self, name: str, where: Tensor) -> None:
        """Set elements of one tensor to zero, as if they had been zero at every point (a pruned weight).

        Args:
            name: the tensor.
            where: bool, of its shape.
        """
        self._settle()
        for tensors in self._planes.values():
            if name in tensors:
                tensors[name].masked_fill_(where.to(tensors[name].device), 0)

    def _overwritten(self) -> Sequence[str]:
        """Name the planes that the next update changes."""
        return list(self._planes)

    @torch.no_grad()
    def undo_state(self) -> dict[str, Any]:
        """Return what `undo` needs to take back the update that comes next: copies of the planes that it changes."""
        self._settle()
        planes = {
            plane: {name: tensor.clone() for name, tensor in self._planes[plane].items()}
            for plane in self._overwritten()
        }
        return {"count": self.count, "planes": planes}

    @torch.no_grad()
    def undo(self, state: Mapping[str, Any]) -> None:
        """Take back the last update, with what `undo_state` returned before it."""
        self._settle()
        self.count = int(state["count"])
        for plane, tensors in state["planes"].items():
            self._planes[plane] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._pass = None

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact restore needs: plain numbers and tensors (not copies)."""
        self._settle()
        return {"kind": self.kind, "count": self.count, **self._scalars(), "planes": dict(self._planes)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. The tensors are copied.

        Raises:
            ConfigError: the state is of another kind of average.
        """
        if state["kind"] != self.kind:
            raise ConfigError(
                f"This state is of a {state['kind']} average and cannot be loaded into a {self.kind} average. Give the "
                f"average the same type and name as in the run that is resumed."
            )
        self._settle()
        self.count = int(state["count"])
        self._load_scalars(state)
        self._planes = {
            plane: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for plane, tensors in state["planes"].items()
        }
        self._pass = None

    # Storage ------------------------------------------------------------------------------------------------------

    def _like(self, tensor: Tensor, plane: str) -> Tensor:
        dtype = self._stored_dtype(tensor.dtype, plane)
        return torch.empty_like(tensor, dtype=dtype, device=self._plane_device(plane), requires_grad=False)

    def _misplaced(self, old: Tensor, tensor: Tensor, plane: str) -> bool:
        """Tell whether a restored tensor must move: to the weights' device, dtype or memory layout."""
        return (
            old.device != (self._plane_device(plane) or tensor.device)
            or old.dtype != self._stored_dtype(tensor.dtype, plane)
            or old.stride() != tensor.stride()
        )

    def _prepare(self, weights: Weights) -> None:
        """Allocate the planes that are missing and move restored ones to where they belong."""
        for plane in self._planes_needed():
            held = self._planes.setdefault(plane, {})
            if held and held.keys() != weights.keys():
                missing, unexpected = sorted(weights.keys() - held.keys()), sorted(held.keys() - weights.keys())
                raise WeightsError(
                    f"The weights are not those that the {self.kind} average holds: new {missing[:6]}, gone "
                    f"{unexpected[:6]}. Names must stay the same between updates; after a change of the architecture "
                    f"start a new average."
                )
            for name, tensor in weights.items():
                old = held.get(name)
                if old is None:
                    held[name] = self._like(tensor, plane)
                    continue
                if old.shape != tensor.shape:
                    raise WeightsError(
                        f"Tensor {name!r} has shape {tuple(tensor.shape)}, and the {self.kind} average holds "
                        f"{tuple(old.shape)}. After a change of the architecture start a new average."
                    )
                if self._misplaced(old, tensor, plane):
                    held[name] = self._like(tensor, plane).copy_(old)
        for plane in [plane for plane in self._planes if plane not in self._planes_needed()]:
            del self._planes[plane]


# What averages want to be given, dtype and device, and which averages want it.
Wanted = list[tuple[tuple[torch.dtype, torch.device], list[Mean]]]


class Pass:
    """The plan of one sweep over the weights for one set of averages: groups, and views of them."""

    def __init__(self, means: Sequence[Mean], weights: Weights) -> None:
        self.means = tuple(means)
        self.key = _key(weights)
        tied = tied_names(weights)
        self.names = [name for name, tensor in weights.items() if is_averaged(tensor) and name not in tied]
        kept = {name: weights[name].detach() for name in self.names}
        for mean in means:
            mean._prepare({name: tensor for name, tensor in kept.items() if mean.covers(name)})
        self.theta: list[list[Tensor]] = []
        self.entries: list[list[tuple[str, slice | None]]] = []
        # For groups of small tensors: the buffer into which they are copied side by side.
        self.stages: list[Tensor | None] = []
        self.sizes: list[list[int]] = []
        # Whether a group holds infinite elements (masks): ∞ - ∞ is NaN, so those that stay as they are keep their value.
        self.infinite: list[bool] = []
        # For each group, the means that cover it, sorted by what they want to be given.
        self.plan: list[Wanted] = []
        # The same for those that are updated in the background, by group.
        self.behind: dict[int, Wanted] = {}
        # Read once from memory: by one average, or by a kernel that updates all.
        once = (len(means) == 1 or all(mean.fused for mean in means)) and not any(mean.revisits for mean in means)
        # The compiled kernel is for one-dimensional tensors. Stochastic rounding draws in the order of the dimensions.
        self.flat = all(mean.fused and mean.dtype != torch.bfloat16 for mean in means)
        plain = all(
            mean._stored_dtype(tensor.dtype, "mean") == tensor.dtype for tensor in kept.values() for mean in means
        )
        self.group = GROUP_ONCE if once and plain else GROUP
        self._build(kept)
        self.offload = Offload({index: self.theta[index] for index in self.behind}) if self.behind else None

    def _build(self, kept: dict[str, Tensor]) -> None:
        for mean in self.means:
            mean._views = []
        open_groups: dict[tuple[object, ...], list[tuple[str, slice | None]]] = {}
        filled: dict[tuple[object, ...], int] = {}

        def close(signature: tuple[object, ...]) -> None:
            filled.pop(signature)
            self._add_group(kept, open_groups.pop(signature), bool(signature[-1]))
            self.infinite.append(bool(signature[-2]))

        # Stochastic rounding draws by tensor, so there small tensors stay apart.
        staged = all(mean.dtype != torch.bfloat16 for mean in self.means)
        for name, tensor in kept.items():
            on_cpu = tensor.device.type == "cpu"
            small = on_cpu and staged and tensor.numel() <= SMALL and tensor.is_contiguous()
            covered = tuple(mean.covers(name) for mean in self.means)
            signature = (tensor.dtype, tensor.device, covered, _has_infinities(tensor), small)
            for part in _parts(tensor, self.group, self.flat):
                open_groups.setdefault(signature, []).append((name, part))
                size = tensor.numel() if part is None else part.stop - part.start
                filled[signature] = filled.get(signature, 0) + size
                if filled[signature] >= (self.group if on_cpu else GROUP_ELSEWHERE):
                    close(signature)
        for signature in list(open_groups):
            close(signature)

    def _add_group(self, kept: dict[str, Tensor], entries: list[tuple[str, slice | None]], small: bool) -> None:
        def views(tensors: dict[str, Tensor]) -> list[Tensor]:
            if not small:
                return [_view(tensors[name], kept[name], part) for name, part in entries]
            # The average's small tensors become parts of one buffer.
            flat = torch.cat([tensors[name].reshape(-1) for name, _ in entries])
            parts = flat.split([kept[name].numel() for name, _ in entries])
            for (name, _), part in zip(entries, parts, strict=True):
                tensors[name] = part.view(kept[name].shape)
            return [flat]

        self.theta.append([_view(kept[name], kept[name], slice(None) if small else part) for name, part in entries])
        self.stages.append(torch.cat(self.theta[-1]) if small else None)
        self.entries.append(entries)
        self.sizes.append([kept[name].numel() for name, _ in entries])
        wanted: dict[bool, dict[tuple[torch.dtype, torch.device], list[Mean]]] = {False: {}, True: {}}
        for mean in self.means:
            if not mean.covers(entries[0][0]):
                mean._views.append(None)
                continue
            planes = {plane: views(tensors) for plane, tensors in mean._planes.items()}
            mean._views.append(planes)
            first = planes["mean"][0]
            # A bfloat16 average is computed in float32 and rounded at the end.
            dtype = torch.float32 if first.dtype == torch.bfloat16 else first.dtype
            wanted[mean._behind(self.theta[-1][0])].setdefault((dtype, first.device), []).append(mean)
        if wanted[True]:
            self.behind[len(self.plan)] = list(wanted[True].items())
        self.plan.append(list(wanted[False].items()))

    def run(self) -> None:
        """Update all averages of this pass, some of them perhaps in the background."""
        self.settle()
        for mean in self.means:
            mean._before = mean.count
            mean._begin()
        if self.offload is not None:
            self.offload.take()
        for index, (theta, plan) in enumerate(zip(self.theta, self.plan, strict=True)):
            self._take_in(index, theta, plan)
        if self.offload is not None:
            self.offload.start(self._run_behind)
        for mean in self.means:
            mean.count += 1

    def _run_behind(self) -> None:
        assert self.offload is not None
        for index, plan in self.behind.items():
            self._take_in(index, self.offload.host[index], plan)

    def _take_in(self, index: int, theta: list[Tensor], plan: Wanted) -> None:
        stage = self.stages[index]
        if stage is not None and plan:
            torch.cat(theta, out=stage)
            theta = [stage]
        for (dtype, device), means in plan:
            given = theta
            if theta[0].dtype != dtype or theta[0].device != device:
                given = [tensor.to(device=device, dtype=dtype) for tensor in theta]
            together: list[tuple[list[Tensor], Tensor]] = []
            for mean in means:
                views = mean._views[index]
                if views is None:
                    continue
                weight = None if self.infinite[index] else mean._fused_weight(index)
                if self.infinite[index]:
                    before = [tensor.clone() for tensor in views["mean"]]
                    mean._apply(index, views, given)
                    for tensor, old, new in zip(views["mean"], before, given, strict=True):
                        tensor.copy_(torch.where(torch.isinf(old) & (old == new), old, tensor))
                elif weight is None:
                    mean._apply(index, views, given)
                else:
                    together.append((views["mean"], weight))
            if together:
                lerp_together(given, together)

    def release(self) -> None:
        """Let the device finish its copies to the host before it changes the weights."""
        if self.offload is not None:
            self.offload.release()

    def settle(self) -> None:
        """Wait for what runs in the background."""
        if self.offload is not None:
            self.offload.settle()


_WITH_EXTREMES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _has_infinities(tensor: Tensor) -> bool:
    """Tell whether a tensor holds an infinite element, without a temporary of its size."""
    if tensor.numel() == 0 or tensor.dtype not in _WITH_EXTREMES:
        return False
    low, high = torch.aminmax(tensor)
    return bool(torch.isinf(low) | torch.isinf(high))


def _key(weights: Weights) -> list[object]:
    key: list[object] = [tensor.data_ptr() for tensor in weights.values()]
    key.extend(weights)
    return key


def _parts(tensor: Tensor, group: int, flat: bool) -> list[slice | None]:
    """Cut a large dense tensor into pieces of `group` elements; leave any other whole, or `flat` in one piece."""
    if tensor.device.type != "cpu" or flat_view(tensor) is None:
        return [None]
    if tensor.numel() <= group:
        return [slice(0, tensor.numel())] if flat else [None]
    return [slice(at, min(at + group, tensor.numel())) for at in range(0, tensor.numel(), group)]


def _view(tensor: Tensor, weight: Tensor, part: slice | None) -> Tensor:
    if part is None:
        return tensor
    flat = tensor.view(-1) if weight.is_contiguous() else flat_view(tensor)
    assert flat is not None
    return flat[part]


@torch.no_grad()
def update(means: Sequence[Mean], weights: Weights, *, released: bool = True) -> None:
    """Update several averages in one pass over the weights.

    Equal, to the last bit, to calling `update` on each. The weights are read once, however many averages there are.

    Args:
        means: the averages.
        weights: name to tensor.
        released: whether the weights may be changed right afterwards. False lets copies to the host overlap with the next
            forward and backward pass; `release` must then be called before the optimizer's step.

    Raises:
        WeightsError: the names or shapes are not those of the updates before.
    """
    if not means:
        return
    plan = means[0]._pass
    if (
        plan is None
        or plan.means != tuple(means)
        or plan.key != _key(weights)
        or any(mean._pass is not plan or mean._stale() for mean in means)
    ):
        for mean in means:
            mean._settle()
        plan = Pass(means, weights)
        for mean in means:
            mean._pass = plan
    plan.run()
    if released:
        plan.release()


def release(means: Sequence[Mean]) -> None:
    """Let the device finish copying weights to the host for these averages before it changes them."""
    for mean in means:
        if mean._pass is not None:
            mean._pass.release()
