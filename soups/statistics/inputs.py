"""Sums over the inputs of layers, by hooks on their forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soups.errors import ConfigError, WeightsError
from soups.statistics.attention import watched
from soups.statistics.layers import Layer, layers_of
from soups.statistics.sums import Sums


class InputSums:
    """Hooks on a module's layers that sum over their inputs while it runs.

    Layers that read one tensor (queries, keys and values; gate and up) have one sum: the first group tells which, and a later
    group that differs is an error.

    Attributes:
        transposed: weights that are stored as (in, out).
    """

    def __init__(self, module: nn.Module, sums: Sums, wanted: Sequence[str]) -> None:
        self.module, self.sums, self.wanted = module, sums, set(wanted)
        self.layers = list(layers_of(module))
        self.transposed = [layer.name for layer in self.layers if layer.axis == 0]
        self._attention = _attention_weights(module)
        self._hooks: list[Any] = []
        self._mask: Tensor | None = None
        self._examples = 0
        self._mode = ""
        self._seen: dict[str, list[int]] = {}
        self._alive: list[Tensor] = []
        self._settled = False
        self._outputs = Outputs()

    def __enter__(self) -> InputSums:
        for layer in self.layers:
            self._hooks.append(
                layer.module.register_forward_hook(
                    lambda _, given, named, output, layer=layer: self._called(layer, given, named, output),
                    with_kwargs=True,
                )
            )
        self._stack = contextlib.ExitStack()
        if self._attention:
            self._stack.enter_context(watched(self._projected))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def summing(self, mask: Tensor | None, examples: int) -> Generator[None]:
        """Within the block, inputs are summed; `mask` (examples, tokens) says which tokens count."""
        self._mask, self._examples, self._mode = mask, examples, "inputs"
        self._seen, self._alive = {}, []
        try:
            yield
        finally:
            self._mode = ""
        if not self._settled:
            self._settled = True
            self._find_shared()
        self._alive = []

    def _find_shared(self) -> None:
        """Let statistics over the same inputs share a sum from now on."""
        first: dict[tuple[Any, ...], str] = {}
        for name, seen in self._seen.items():
            key = (name.split("/", 1)[0], tuple(self.sums.tensors[name].shape), *seen)
            if key in first:
                self.sums.share(name, first[key])
            else:
                first[key] = name

    @contextlib.contextmanager
    def watching_outputs(self, wanted: bool, mask: Tensor | None) -> Generator[Outputs]:
        """Within the block, the outputs of layers are kept for their derivatives, if that is wanted."""
        self._outputs, self._mask, self._mode = Outputs(), mask, "outputs" if wanted else ""
        try:
            yield self._outputs
        finally:
            self._mode = ""

    def _called(self, layer: Layer, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        source: Any = given[0] if given else next(iter(named.values()), None)
        if not isinstance(source, Tensor):
            return
        if self._mode == "inputs" and layer.kind in self.wanted:
            self._sum(layer.key, source, layer)
        elif self._mode == "outputs" and layer.kind == "gram" and isinstance(output, Tensor):
            self._outputs.watch(layer.name, output, layer.spatial, self._mask)

    def _sum(self, key: str, source: Tensor, layer: Layer) -> None:
        if self._shared(key, [source]):
            return
        self._alive.append(source)
        if layer.kind == "frequency":
            tokens = self._kept(source.unsqueeze(-1), key).reshape(-1)
            counts = torch.bincount(tokens.cpu(), minlength=layer.size)
            self.sums.add(key, counts.to(source.device), tokens.numel())
            return
        rows = _wide(source)
        rows = layer.rows(rows)
        rows = rows.reshape(-1, rows.shape[-1]) if layer.spatial else self._kept(rows, key)
        if layer.kind == "second_moment":
            self.sums.add(key, rows.double().square().sum(0) if rows.device.type != "mps" else rows.square().sum(0),
                          len(rows))  # fmt: skip
        else:
            self.sums.add(key, _gram(rows, layer.groups), len(rows))

    def _projected(self, weight: Tensor, sources: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        name = self._attention.get(id(weight))
        if name is None:
            return
        if self._mode == "outputs":
            if len(outputs) == 1:
                self._outputs.watch(name, outputs[0], False, self._mask)
        elif self._mode == "inputs" and "gram" in self.wanted:
            key = f"gram/{name}"
            one = all(source is sources[0] for source in sources)
            inputs = sources[:1] if one else sources
            if self._shared(key, inputs):
                return
            self._alive.extend(inputs)
            rows = [self._kept(_wide(source), key) for source in inputs]
            grams = torch.stack([_gram(part, 1) for part in rows])
            self.sums.add(key, grams[0] if one else grams, len(rows[0]))

    def _shared(self, key: str, sources: Sequence[Tensor]) -> bool:
        """Note which tensors a layer reads; tell whether its sum is another's."""
        seen = self._seen.setdefault(key, [])
        seen.extend(id(source) for source in sources)
        first = self.sums.aliases.get(key) if self._settled else None
        if first is None:
            return False
        if self._seen.get(first, [])[: len(seen)] != seen:
            raise WeightsError(
                f"{key} and {first} read the same tensor in the first examples and different ones now, so their sums cannot be "
                f"shared. Collect them one at a time, in calls of their own."
            )
        return True

    def _kept(self, rows: Tensor, key: str) -> Tensor:
        """Return the rows (…, features) that the mask keeps, as (rows, features)."""
        flat = rows.reshape(-1, rows.shape[-1])
        if self._mask is None:
            return flat
        if tuple(rows.shape[:-1]) in ((self._examples,), (self._examples, 1)) and self._mask.shape[1] != 1:
            return flat  # one row an example: a pooled text
        placed = _placed(self._mask.to(rows.device), rows.shape[:-1])
        if placed is not None:
            return rows.expand(*placed.shape, rows.shape[-1])[placed]
        raise ConfigError(
            f"{key}: its input has rows {tuple(rows.shape[:-1])}, which the mask {tuple(self._mask.shape)} of tokens does not "
            f"fit. Give mask='none' to count every row, or a mask of your own."
        )

    def uncovered(self) -> dict[str, str]:
        """Return the parameters that no statistic covers, and why."""
        found = [*self.sums, *self.sums.aliases]
        covered = {name.split("/", 1)[1] for name in found}
        known = {layer.name: layer for layer in self.layers}
        missing: dict[str, str] = {}
        for name, one in self.module.named_parameters(remove_duplicate=False):
            if name in covered:
                continue
            layer = known.get(name)
            if layer is not None and layer.kind in self.wanted:
                missing[name] = "its layer was not called"
            elif layer is not None:
                missing[name] = f"{layer.kind} was not asked for"
            else:
                missing[name] = "no rule knows its layer" if one.ndim > 1 else "no rule for a bias"
        return missing


class Outputs:
    """Outputs of layers in one forward pass of one example, and the sums over their derivatives."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Tensor, bool]] = []
        self._mask: Tensor | None = None

    def watch(self, name: str, output: Tensor, spatial: bool, mask: Tensor | None) -> None:
        """Keep an output; rows of tokens that the mask leaves out do not count."""
        self._mask = mask
        self._found.append((name, output, spatial))

    def tensors(self) -> list[Tensor]:
        """Return the outputs."""
        return [output for _, output, _ in self._found]

    def add(self, sums: Sums, gradients: Sequence[Tensor | None], weight: float, *, first: bool) -> None:
        """Add weight · g gᵀ of every output's derivative."""
        for (name, output, spatial), given in zip(self._found, gradients, strict=True):
            gradient = torch.zeros_like(output) if given is None else given
            rows = _wide(gradient.flatten(2).transpose(1, 2) if spatial else gradient)
            placed = None if self._mask is None or spatial else _placed(self._mask.to(rows.device), rows.shape[:-1])
            rows = rows.reshape(-1, rows.shape[-1]) if placed is None else rows[placed]
            sums.add(f"kfac_out/{name}", weight * _gram(rows, 1).double(), len(rows) if first else 0)


def _placed(mask: Tensor, lead: torch.Size) -> Tensor | None:
    """Return a mask (examples, tokens) in the place of these two among some leading axes; None where they are not found.

    Examples come first and tokens second, or the other way round, or other axes (heads) lie between; positions without examples,
    (tokens,) or (1, tokens), are those of every example.
    """
    examples, tokens = mask.shape
    if lead in ((tokens,), (1, tokens)):
        return mask
    if lead == (examples * tokens,):
        return mask.reshape(-1)
    for first, second in [(0, 1), (1, 0), *((0, axis) for axis in range(2, len(lead)))]:
        if max(first, second) < len(lead) and lead[first] == examples and lead[second] == tokens:
            shape = [1] * len(lead)
            shape[first], shape[second] = examples, tokens
            return (mask if first < second else mask.T).reshape(shape).expand(lead)
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.detach()


def _gram(rows: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return rows.T @ rows
    parts = rows.reshape(len(rows), groups, -1).transpose(0, 1)
    return parts.transpose(1, 2) @ parts


def _attention_weights(module: nn.Module) -> dict[int, str]:
    """Return the weights of every `nn.MultiheadAttention` by identity."""
    found: dict[int, str] = {}
    for prefix, one in module.named_modules():
        if isinstance(one, nn.MultiheadAttention):
            start = f"{prefix}." if prefix else ""
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(one, name)
                if weight is not None:
                    found[id(weight)] = start + name
            found[id(one.out_proj.weight)] = start + "out_proj.weight"
    return found
