"""Quantised checkpoints: FP8 weights with scales are read as the numbers that they stand for, other codes are refused by name.

A quantised weight is codes and scales in tensors of their own. Averaged as if they were numbers they give garbage without any
error. FP8 is the exception that can be undone exactly: w = code · scale, the product of two float32 numbers, with one scale for
the tensor, for each row, or for each block of rows and columns (DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.stores.store import Store, TensorMeta
from soups.stores.views import StoreView

_FP8 = frozenset((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))
_CODES = frozenset((torch.int8, torch.uint8, torch.int32, torch.uint16, torch.uint32, *_FP8))
# The block of rows and columns that shares a scale, where the configuration names none.
_BLOCK = (128, 128)
# Names of a weight's scale. All of them multiply, `scale_inv` too: it is the inverse of the scale that quantised.
_SCALES = ("{}_scale_inv", "{}_scale", "{module}.scale_weight", "{module}.scale_inv", "{module}.scale")
# Scales of activations and of the cache, which play no part in weights.
_OTHER_SCALES = re.compile(
    r"(.*\.)?(input_scale|output_scale|input_scale_ub|scale_input|k_scale|v_scale|q_scale|prob_output_scale|scaled_fp8"
    r"|activation_scale|\w+_input_scale)"
)
# Names of tensors by which formats are recognised; a format's first mark must be there, and for some a second.
_FORMATS: tuple[tuple[str, str], ...] = (
    ("GPTQ", r".*\.g_idx"),
    ("AWQ or GPTQ", r".*\.(qweight|qzeros)"),
    ("bitsandbytes 4-bit", r".*\.(quant_state\.bitsandbytes__\w+|quant_map|nested_absmax|absmax)"),
    ("bitsandbytes 8-bit", r".*\.(SCB|weight_format)"),
    ("MXFP4", r".*_blocks"),
    ("NVFP4 (ModelOpt)", r".*\.weight_scale_2"),
    ("compressed-tensors, packed", r".*\.(weight_packed|weight_shape)"),
    ("AQLM", r".*\.(codebooks|codes)"),
    ("QuIP#", r".*\.(Qidxs|Qidxs_\w+)"),
    ("EXL2", r".*\.q_(weight|invperm|scale_max|groups)"),
    ("EXL3", r".*\.(trellis|suh|svh)"),
    ("HQQ", r".*\.(W_q|meta\.scale)"),
    ("quanto", r".*\.weight\._(data|scale)"),
    ("torchao", r".*\.(_?weight_(qdata|zero_point)|weight:_data)"),
    ("EETQ", r".*\.weight_scales"),
    ("SpQR or HIGGS", r".*\.(dense_weights|row_offsets|tables2)"),
    ("torch's quantised modules", r".*\.(_packed_params(\..*)?|zero_point)"),
)
_MATCHERS = tuple((name, re.compile(pattern)) for name, pattern in _FORMATS)


class Scaled(NamedTuple):
    """A weight in FP8.

    Attributes:
        scale: the name of its scale.
        block: the rows and columns that share one.
    """

    scale: str
    block: tuple[int, int]


class DequantisedStore(StoreView):
    """A checkpoint with FP8 weights, seen as the float32 products of codes and scales; scales are left out.

    Args:
        store: the checkpoint; closed with this one.
        weights: the weights in FP8, by name.
        dropped: names that are left out.
        declared: the dtype that the model is meant to have; merges write it when they are asked for none.
    """

    def __init__(
        self, store: Store, weights: Mapping[str, Scaled], dropped: frozenset[str], declared: torch.dtype
    ) -> None:
        super().__init__(store)
        self._weights, self._dropped, self._declared = dict(weights), dropped, declared
        self._scales: dict[str, Tensor] = {}

    def keys(self) -> list[str]:
        """Return the names, scales left out."""
        return [key for key in self.store if key not in self._dropped]

    def original(self, key: str) -> str:
        """Return the name itself, if it is not that of a scale."""
        if key in self._dropped:
            raise self.absent(key)
        return key

    def changes(self, name: str) -> bool:
        """Tell whether a weight is in FP8."""
        return name in self._weights

    def change(self, name: str) -> str | None:
        """Return the identity of the scale."""
        scale, block = self._weights[name]
        identity = self.store.identity(scale)
        return None if identity is None else f"{identity}×{block}"

    def changed_meta(self, name: str) -> TensorMeta:
        """Return the shape, and float32."""
        return TensorMeta(self.store.meta(name).shape, torch.float32)

    def declared_dtype(self, key: str) -> torch.dtype:
        """Return the model's own dtype for weights in FP8."""
        return self._declared if self.changes(self.source(key)) else super().declared_dtype(key)

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of code · scale in float32."""
        scale = self._scale(name)
        if scale.numel() == 1:
            return self.store.read_flat(name, start, stop).float().mul_(scale.reshape(()))
        _, rows, columns = _matrices(self.store.meta(name).shape)
        high, wide = self._weights[name].block
        first, last = start // columns, -(-stop // columns)
        codes = self.store.read_flat(name, first * columns, last * columns).float().view(-1, columns)
        # Matrices of a stack (experts) have their scales one after another.
        row = torch.arange(first, last)
        place = row.div(rows, rounding_mode="floor") * scale.shape[-2] + (row % rows).div(high, rounding_mode="floor")
        factors = scale.reshape(-1, scale.shape[-1])[place]
        codes.mul_(factors.repeat_interleave(wide, 1)[:, :columns] if wide < columns else factors)
        return codes.view(-1)[start - first * columns : stop - first * columns]

    def _scale(self, name: str) -> Tensor:
        if name not in self._scales:
            self._scales[name] = self.store.read(self._weights[name].scale).float()
            shape = self.store.meta(name).shape
            if self._scales[name].numel() > 1:
                self._scales[name] = self._scales[name].reshape(_grid(shape, self._weights[name].block))
        return self._scales[name]


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how many matrices a tensor holds, and the rows and columns of each."""
    *stack, rows, columns = (1, 1, *shape)
    return torch.Size(stack).numel(), rows, columns


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape of the scales of a tensor."""
    stack, rows, columns = _matrices(shape)
    return stack, -(-rows // block[0]), -(-columns // block[1])


def as_numbers(store: Store, config: Mapping[str, Any] | None = None) -> Store:
    """Return a checkpoint whose tensors are numbers: itself, or a view that undoes FP8.

    Args:
        store: a checkpoint; closed with the one that is returned.
        config: the model's `config.json`, where there is one.

    Raises:
        WeightsError: its weights are codes that cannot be undone exactly.
    """
    config = config or {}
    keys = store.keys()
    names = set(keys)
    tied = store.tied()
    readable = [key for key in keys if key not in store.unreadable and key not in tied]
    settings = _settings(config)
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "").lower()
    _refuse_formats(store, keys, method)
    fp8 = [key for key in readable if store.meta(key).dtype in _FP8]
    if not fp8:
        return store
    weights: dict[str, Scaled] = {}
    for key in fp8:
        module = key.rpartition(".")[0]
        scale = next((name for form in _SCALES if (name := form.format(key, module=module)) in names), None)
        if scale is not None:
            weights[key] = Scaled(scale, _block(store, key, scale, settings))
        elif method:
            raise WeightsError(
                f"{store.location}: {key!r} is in FP8 by {method}, and its scale ({key}_scale_inv or {key}_scale) is not there. "
                f"Copy the checkpoint again, or merge the one that it was quantised from."
            )
    if not weights:
        return store  # numbers that somebody has stored in FP8, without scales
    for key in weights:
        if f"{key}_zero_point" in names:
            raise _refused(store, "FP8 with zero points", f"{key}_zero_point")
    dropped = {scaled.scale for scaled in weights.values()} | {key for key in keys if _OTHER_SCALES.fullmatch(key)}
    return DequantisedStore(store, weights, frozenset(dropped), _declared(config))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's `config.json` without what it says of quantisation: merged weights are numbers."""
    return {
        key: plain_config(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _refuse_formats(store: Store, keys: list[str], method: str) -> None:
    names = set(keys)
    coded = [
        key
        for key in keys
        if key in store.unreadable or (store.meta(key).dtype in _CODES and len(store.meta(key).shape) > 1)
    ]
    if not coded:
        return
    for name, pattern in _MATCHERS:
        marks = [key for key in keys if pattern.fullmatch(key)]
        if name == "MXFP4":
            marks = [key for key in marks if f"{key.removesuffix('_blocks')}_scales" in names]
        if name == "torch's quantised modules":
            marks = [key for key in marks if f"{key.rpartition('.')[0]}.scale" in names or "_packed_params" in key]
        if marks:
            raise _refused(store, name if method in ("", "compressed-tensors") else f"{name} ({method})", marks[0])
    for key in coded:
        if key in store.unreadable:  # named when it is asked for
            continue
        if store.meta(key).dtype not in (torch.int8, torch.uint8):
            continue
        weight = key.rpartition(".")[2] in ("weight", "kernel")
        # A buffer may lie beside a parameter called `scale`; only a weight's own names count for other tensors (experts).
        forms = _SCALES if weight else _SCALES[:2]
        scaled = any(form.format(key, module=key.rpartition(".")[0]) in names for form in forms)
        if weight or scaled:
            raise _refused(store, method or ("8-bit integers with scales" if scaled else "8-bit integers"), key)
    if coded and method and method not in ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "finegrained_fp8"):
        raise _refused(store, method, coded[0])


def _refused(store: Store, what: str, key: str) -> WeightsError:
    return WeightsError(
        f"{store.location} is quantised ({what}): {key!r} holds codes, and their average means nothing. Merge the checkpoint "
        f"that it was quantised from and quantise the result, or load it with the library that quantised it, dequantise it "
        f"there and save it in bfloat16."
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    for part in (config, config.get("text_config"), config.get("llm_config")):
        found = cast("Mapping[str, Any]", part).get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(found, Mapping):
            return dict(cast("Mapping[str, Any]", found))
    return {}


def _declared(config: Mapping[str, Any]) -> torch.dtype:
    for part in (config, config.get("text_config"), config.get("llm_config")):
        for key in ("dtype", "torch_dtype"):
            named = cast("Mapping[str, Any]", part).get(key) if isinstance(part, Mapping) else None
            found = getattr(torch, str(named).removeprefix("torch."), None)
            if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
                return found
    return torch.bfloat16


def _long(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size > 1)


def _block(store: Store, key: str, scale: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    shape, found = store.meta(key).shape, store.meta(scale).shape
    _, rows, columns = _matrices(shape)
    if torch.Size(found).numel() == 1:
        return rows, columns
    asked: Any = settings.get("weight_block_size")
    own = [(int(asked[0]), int(asked[1]))] if isinstance(asked, list) and len(cast("list[Any]", asked)) == 2 else []
    # One scale a matrix of a stack, a row, a column, a block; 32 elements of a row in MXFP8.
    blocks = (*own, (rows, columns), (1, columns), (rows, 1), _BLOCK, (1, 32))
    # The scale's full shape tells rows from columns in a square matrix; many files leave out dimensions of size one.
    exact = (block for block in blocks if _grid(shape, block) == (1, 1, *found)[-3:] and len(found) > 1)
    loose = (block for block in blocks if _long(_grid(shape, block)) == _long(found))
    block = next(exact, next(loose, None))
    if block is not None:
        return block
    raise WeightsError(
        f"{store.location}: {key!r} of shape {shape} is in FP8 with a scale of shape {tuple(found)} ({scale!r}), which is "
        f"neither one for the tensor, nor one a row, nor one a block of {_BLOCK}. State weight_block_size in the "
        f"quantization_config of config.json."
    )
