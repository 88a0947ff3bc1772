"""Outputs of a network's frozen lowest layers, computed once for each text and kept on disk.

Where embeddings and the lowest layers of an encoder stay as they are, their output for a text is the same in every epoch,
in every fine-tune and in every average of fine-tunes. With five of MiniLM's six layers frozen, an epoch and an evaluation
take about a third of their time once the outputs are there. Any text model has it as a setting: `model.freeze_layers=5
model.cache_frozen=true`.

`cache_frozen_layers` works inside the module: batches stay token ids, parameters keep their names, and every caller
(training, evaluation, probes, reward pairs) works unchanged. It is exact:

- Logits are those without the cache, up to the rounding of another batch shape. Outputs are computed for a whole set of texts
  in an order of its own, so that batches do not change them. The first use compares logits with and without the cache and
  refuses a network where they differ.
- Kept outputs belong to the values of the frozen weights. Other values (another checkpoint, `functional_call`, an edit in
  place) are noticed in the next forward pass and get outputs of their own.
- Dropout in the frozen part is off, in training too.

Texts are cached that went through `TextInput.tokenise`; all others, autocast, and weights under `vmap` take the ordinary way.
A text of 32 tokens and 384 features takes 49 kB below `soups.tasks.wheels.cache_folder`, in `frozen/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from soups.errors import ConfigError
from soups.stores.files import fingerprint, replacing_folder
from soups.stores.safetensors import read_safetensors
from soups.stores.writer import write_safetensors
from soups.tasks.wheels import cache_folder
from soups.weights import hash_weights

# Outputs by the name of their file: (tokens of all texts, features), and the first row of each text.
_BLOCKS: dict[str, tuple[Tensor, dict[bytes, tuple[int, int]]]] = {}
# Texts of one length that are computed at once.
_TOGETHER = 32
# Frozen weights that outputs were computed with, by hash; compared in full before outputs are used.
_FROZEN: dict[str, dict[str, Tensor]] = {}


class FrozenLayer(nn.Module):
    """A frozen layer that returns the cached output of the whole frozen part, where there is one.

    Its parameters are the original layer's, under the same names. It stays in evaluation mode.

    Args:
        layer: the original.
        outputs: shared by the frozen layers of a module.
        is_last: of the frozen ones.
    """

    def __init__(self, layer: nn.Module, outputs: FrozenOutputs, is_last: bool) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = layer._modules, layer._parameters, layer._buffers
        self._layer = [layer]  # in a list: not a child of its own
        self._outputs, self.is_last = outputs, is_last
        layer.eval()

    def train(self, mode: bool = True) -> FrozenLayer:
        """Stay in evaluation mode."""
        self._layer[0].train(False)
        return super().train(False)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return the layer's output, or the cached one in its place."""
        if (hidden := self._outputs.hidden) is not None:
            return (hidden,) if self._outputs.in_tuple else hidden
        result = self._layer[0](*arguments, **named)
        if self.is_last and self._outputs.is_computing:
            self._outputs.in_tuple = isinstance(result, tuple)
            raise _Computed(cast(Tensor, result[0] if isinstance(result, tuple) else result))
        return result


class _Computed(Exception):
    """Carries the frozen part's output out of a forward pass that needs to go no further."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class FrozenOutputs:
    """Finds or computes the frozen part's outputs for the texts of a batch, around a module's forward pass.

    Args:
        names: of the parameters and buffers that decide the outputs.
        architecture: what else decides them.

    Attributes:
        hidden: outputs for the batch that is in the module, (B, tokens, features); None takes the ordinary way.
        in_tuple: the layers return tuples.
        is_computing: the pass is to end at the last frozen layer.
    """

    def __init__(self, names: Sequence[str], architecture: str) -> None:
        self.names, self.architecture = list(names), architecture
        self.hidden: Tensor | None = None
        self.in_tuple = self.is_computing = False
        self._texts: dict[str, list[Tensor]] = {}  # token ids by the name of a set of texts
        self._set_of: dict[bytes, str] = {}
        self._found: list[tuple[Tensor, int]] = []  # tensors, and their versions, that were found equal to …
        self._hash = ""  # … these weights
        self._is_checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenOutputs:
        copied = FrozenOutputs(self.names, self.architecture)
        copied._texts, copied._set_of = self._texts, self._set_of
        memo[id(self)] = copied
        return copied

    def expect(self, ids: Sequence[Tensor]) -> None:
        """Announce texts, as token ids of any length: their outputs are computed together at the first use of one."""
        keys = [_key(one) for one in ids]
        name = fingerprint([key.hex() for key in keys])
        if name not in self._texts:
            self._texts[name] = list(ids)
            for key in keys:
                self._set_of.setdefault(key, name)

    def before(self, module: nn.Module, _arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look a batch up, before the module's forward pass."""
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if self.is_computing or ids is None or mask is None or not self._is_applicable(module, ids):
            return
        rows, lengths = ids.detach().to("cpu", torch.int32), mask.sum(dim=1).tolist()
        if bool((mask[:, 1:] > mask[:, :-1]).any()):  # padded on the left
            return
        keys = [_key(row[:length]) for row, length in zip(rows, lengths, strict=True)]
        if any(key not in self._set_of for key in keys):
            return
        weights = self._hash_of(module)
        found = [self._output(module, weights, key) for key in keys]
        if not self._is_checked:
            self._check(module, ids, mask, found)
        self.hidden = _padded(found, ids.shape[1]).to(ids.device)

    def after(self, *_: Any) -> None:
        """Forget the batch, after the module's forward pass."""
        self.hidden = None

    def _is_applicable(self, module: nn.Module, ids: Tensor) -> bool:
        if torch.is_autocast_enabled(ids.device.type) or ids.ndim != 2:
            return False
        functorch = cast(Any, torch)._C._functorch
        return not any(
            tensor.requires_grad or functorch.is_functorch_wrapped_tensor(tensor) for tensor in self._frozen(module)
        )

    def _frozen(self, module: nn.Module) -> Iterator[Tensor]:
        for name in self.names:
            part, _, leaf = name.rpartition(".")
            yield cast(Tensor, getattr(module.get_submodule(part), leaf))

    def _hash_of(self, module: nn.Module) -> str:
        """Return the hash of the frozen weights as they are now."""
        frozen = list(self._frozen(module))
        if len(self._found) == len(frozen) and all(
            # The tensors are kept, so that no other one can come to stand where they stood.
            one is tensor and version == _version(one)
            for one, (tensor, version) in zip(frozen, self._found, strict=True)
        ):
            return self._hash
        known = _FROZEN.get(self._hash)
        if known is None or not all(torch.equal(known[n], t.cpu()) for n, t in zip(self.names, frozen, strict=True)):
            current = {n: t.detach().cpu().clone() for n, t in zip(self.names, frozen, strict=True)}
            self._hash = fingerprint([hash_weights(current), self.architecture])
            _FROZEN.setdefault(self._hash, current)
        self._found = [] if any(one.is_inference() for one in frozen) else [(one, _version(one)) for one in frozen]
        return self._hash

    def _output(self, module: nn.Module, weights: str, key: bytes) -> Tensor:
        texts = self._set_of[key]
        name = fingerprint([weights, texts])
        if name not in _BLOCKS:
            _BLOCKS[name] = self._read_or_compute(module, self._texts[texts], cache_folder() / "frozen" / name)
        outputs, places = _BLOCKS[name]
        first, last = places[key]
        return outputs[first:last]

    def _read_or_compute(
        self, module: nn.Module, texts: Sequence[Tensor], folder: Path
    ) -> tuple[Tensor, dict[bytes, tuple[int, int]]]:
        path, distinct = folder / "outputs.safetensors", list({_key(one): one for one in texts}.values())
        if not path.is_file():
            outputs = torch.cat(self._compute(module, distinct))
            with replacing_folder(folder) as scratch:
                write_safetensors(scratch / path.name, {"outputs": outputs})
        ends = torch.tensor([len(one) for one in distinct]).cumsum(0).tolist()
        places = {_key(one): (end - len(one), end) for one, end in zip(distinct, ends, strict=True)}
        return read_safetensors(path)["outputs"], places

    def _compute(self, module: nn.Module, texts: Sequence[Tensor]) -> list[Tensor]:
        """Return the frozen part's output for each text, (tokens, features); texts of one length make a batch."""
        device = next(self._frozen(module)).device
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        self.is_computing = True
        try:
            with torch.inference_mode():
                for _, same in groupby(order, key=lambda number: len(texts[number])):
                    numbers = list(same)
                    for begin in range(0, len(numbers), _TOGETHER):
                        chunk = numbers[begin : begin + _TOGETHER]
                        rows = torch.stack([texts[number] for number in chunk]).to(device, torch.int64)
                        for number, output in zip(chunk, _computed(module, rows).cpu(), strict=True):
                            found[number] = output
        finally:
            self.is_computing = False
        return found

    def _check(self, module: nn.Module, ids: Tensor, mask: Tensor, found: Sequence[Tensor]) -> None:
        """Compare logits with and without cached outputs.

        Raises:
            ConfigError: they differ: something else than the last frozen layer's output goes on to the layers above.
        """
        self.is_computing = True  # keeps this pass from looking batches up …
        last = [part for part in module.modules() if isinstance(part, FrozenLayer) and part.is_last]
        was_training = module.training
        try:
            for part in last:
                part.is_last = False  # … and from ending early
            with torch.inference_mode():
                module.eval()
                plain = module(input_ids=ids, attention_mask=mask)
                self.hidden = _padded(found, ids.shape[1]).to(ids.device)
                cached = module(input_ids=ids, attention_mask=mask)
        finally:
            self.is_computing, self.hidden = False, None
            for part in last:
                part.is_last = True
            module.train(was_training)
        plain, cached = getattr(plain, "logits", plain), getattr(cached, "logits", cached)
        if not torch.allclose(plain, cached, rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"The outputs of the frozen layers of {type(module).__name__} cannot be cached: its upper layers need more "
                f"than them (logits differ by {float((plain - cached).abs().max()):.2g}). Set model.cache_frozen=false."
            )
        self._is_checked = True


def cache_frozen_layers(
    module: nn.Module, stack: nn.ModuleList, count: int, embeddings: Sequence[nn.Module]
) -> FrozenOutputs:
    """Make a module keep the outputs of its frozen lowest layers.

    Args:
        module: called with `input_ids` and `attention_mask`, both (B, tokens), padded on the right.
        stack: its layers, from the lowest.
        count: how many of them are frozen.
        embeddings: everything below the layers, frozen as well.

    Returns:
        The cache, which is to be told of texts (`FrozenOutputs.expect`).
    """
    parts = [*embeddings, *list(stack)[:count]]
    inside = {id(tensor) for part in parts for tensor in [*part.parameters(), *part.buffers()]}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    layers = [f"{type(part).__name__}" for part in parts]
    names = [name for name, tensor in tensors if id(tensor) in inside]
    outputs = FrozenOutputs(names, fingerprint([layers, str(getattr(module, "config", ""))]))
    for part in embeddings:
        for one in part.modules():
            if isinstance(one, nn.Dropout):
                one.p = 0.0
    for number in range(count):
        stack[number] = FrozenLayer(stack[number], outputs, is_last=number == count - 1)
    module.register_forward_pre_hook(outputs.before, with_kwargs=True)
    module.register_forward_hook(outputs.after, always_call=True)
    return outputs


def _computed(module: nn.Module, ids: Tensor) -> Tensor:
    try:
        module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except _Computed as done:
        return done.hidden
    raise ConfigError(f"The frozen layers of {type(module).__name__} take no part in its forward pass.")


def _version(tensor: Tensor) -> int:
    """Return the count of a tensor's changes in place; -1 where it has none."""
    return -1 if tensor.is_inference() else tensor._version


def _key(ids: Tensor) -> bytes:
    return ids.to(torch.int32).numpy().tobytes()


def _padded(found: Sequence[Tensor], length: int) -> Tensor:
    """Return outputs of B texts as (B, length, features), zeros where a text has ended."""
    padded = torch.zeros(len(found), length, found[0].shape[1])
    for row, one in zip(padded, found, strict=True):
        row[: len(one)] = one
    return padded
