"""`pack`: experts of several tasks into one file, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from soups.artifacts.header import Header, Origin, name_of
from soups.artifacts.method import WHOLE, PartMethod, Piece
from soups.artifacts.methods import make_part_method
from soups.errors import ConfigError, WeightsError
from soups.merging.operands import Operands, Source
from soups.merging.plan import is_averaged_dtype
from soups.statistics import hash_store
from soups.stores import Checkpoint, FileWriter, Store, TensorMeta, open_store
from soups.stores.store import headers
from soups.weights import describe_mismatch

_CHUNK = 1 << 19


def pack(
    method: str | PartMethod,
    models: Mapping[str, Checkpoint],
    *,
    base: Checkpoint,
    out: str | os.PathLike[str],
    overwrite: bool = False,
    **parameters: Any,
) -> Path:
    """Write the experts of several tasks into one safetensors file.

    Every expert is read once for its hash and once or more to be packed, a stretch of a tensor at a time. Integer and bool
    tensors, and floating ones that the method leaves alone, are kept whole where they differ from the base model's.

    Args:
        method: a name of `PART_METHODS`, or a method.
        models: the expert of each task; whatever `open_store` takes.
        base: the model that the experts started from. It is not stored.
        out: the `.safetensors` file to make.
        overwrite: replace an existing file.
        parameters: of the method, where it is given by its name.

    Returns:
        The file.

    Raises:
        ConfigError: no tasks, a name of a task with a slash, an unknown method or parameter.
        WeightsError: an expert does not fit the base model.
    """
    made = make_part_method(method, **parameters) if isinstance(method, str) else method
    name = method if isinstance(method, str) else type(method).__name__.lower()
    if not models:
        raise ConfigError("An artifact needs at least one task: pack('bitdelta', {'news': expert}, base=…, out=…).")
    for task in models:
        if not task or "/" in task:
            raise ConfigError(f"The task name {task!r} is empty or holds a slash. Choose another.")
    with ExitStack() as stack:

        def opened(place: Checkpoint) -> Store:
            return place if isinstance(place, Store) else stack.enter_context(open_store(place))

        start = opened(base)
        experts = {task: opened(place) for task, place in models.items()}
        check_experts(start, experts)
        header = Header(
            method=name,
            parameters=made.settings(),
            base=origin_of(start),
            tasks={t: origin_of(s) for t, s in experts.items()},
        )
        plan = planned(made, start, experts)
        with FileWriter(Path(out), plan, metadata=header.metadata(), overwrite=overwrite) as writer:
            for piece, values in encoded(made, start, experts):
                writer.write_flat(piece, *values)
    return Path(out)


def origin_of(store: Store) -> Origin:
    """Return where a model is, and the hash of its weights."""
    return Origin(location=store.location, weights_hash=hash_store(store))


def check_experts(base: Store, experts: Mapping[str, Store]) -> None:
    """Check that experts have the base model's names, shapes and kinds.

    Raises:
        WeightsError: one has not.
    """
    expected = headers(base)
    for task, store in experts.items():
        if problem := describe_mismatch(expected, headers(store)):
            raise WeightsError(
                f"{store.location} ({task}) does not fit the base model {base.location}: {problem}. Pack experts of one "
                f"architecture, head included."
            )


def planned(method: PartMethod, base: Store, experts: Mapping[str, Store]) -> dict[str, TensorMeta]:
    """Return every piece that is written, with shape and dtype."""
    plan: dict[str, TensorMeta] = {}
    for key in keys_of(base):
        meta = base.meta(key)
        parts = method.part(meta) if is_reduced(meta) else None
        if parts is None:
            for task in kept_whole(base, experts, key):
                plan[name_of(task, key, WHOLE)] = experts[task].meta(key)
            continue
        plan |= {name_of(None, key, piece): found for piece, found in method.shared(meta).items()}
        for task in experts:
            plan |= {name_of(task, key, piece): found for piece, found in parts.items()}
    return plan


def encoded(
    method: PartMethod, base: Store, experts: Mapping[str, Store]
) -> Iterator[tuple[str, tuple[int, torch.Tensor]]]:
    """Yield every stretch to write: the piece's name in the file, and where its values begin."""
    tasks = list(experts)
    for key in keys_of(base):
        meta = base.meta(key)
        if not is_reduced(meta) or method.part(meta) is None:
            for task in kept_whole(base, experts, key):
                yield name_of(task, key, WHOLE), (0, experts[task].read_flat(key))
            continue
        dtype = torch.float64 if meta.dtype == torch.float64 else torch.float32
        sources = [Source(store, key) for store in experts.values()]
        operands = Operands(key, meta.shape, sources, Source(base, key), chunk=_CHUNK, dtype=dtype)
        with torch.no_grad():
            for piece in method.encode(operands):
                yield _place(key, tasks, piece), (piece.start, piece.values)


def _place(key: str, tasks: Sequence[str], piece: Piece) -> str:
    return name_of(None if piece.task is None else tasks[piece.task], key, piece.name)


def keys_of(base: Store) -> list[str]:
    """Return the names of the tensors that are packed: of tied ones the first."""
    tied = base.tied()
    return [key for key in base if key not in tied]


def is_reduced(meta: TensorMeta) -> bool:
    """Tell whether a method is asked about a tensor: a floating one with elements."""
    return is_averaged_dtype(meta.dtype) and not meta.dtype.is_complex and meta.numel > 0


def kept_whole(base: Store, experts: Mapping[str, Store], key: str) -> list[str]:
    """Return the tasks whose tensor differs from the base model's."""
    own = base.read_flat(key)
    return [task for task, store in experts.items() if not torch.equal(store.read_flat(key), own)]
