"""The engine: tensors of several models through a merge method, in bounded memory, on all cores.

Each worker reads a stretch of a tensor from every model, merges it, and writes the result to its place in the output. The
output's layout is fixed beforehand, so there is no queue and no order to keep: one worker waits for the disk while another
computes. The system is told which bytes come next. The result's bits depend on neither the number of workers nor the chunk
size (see `soups.merging.operands`); torch runs each operation on one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from soups.errors import ConfigError, WeightsError
from soups.merging import kernels
from soups.merging.chunk import Chunk
from soups.merging.infinities import (
    check_sources,
    without_shared_infinities,
    without_shared_infinities_between,
)
from soups.merging.job import Job
from soups.merging.method import Method, WholeModelMethod
from soups.merging.operands import Operands
from soups.merging.sums import BLOCK
from soups.stores.store import TensorMeta

DEFAULT_BUDGET = 512 * 2**20
# Enough to hide the cost of Python calls, for which workers wait for one another, little enough for the outer caches.
_BEST_CHUNK = 1 << 19
# Compiled loops read files in batches of their own, so that a chunk is only what is worth a call.
_BEST_COMPILED_CHUNK = 1 << 20
# On a device every operation is a launch: fewer, larger ones; and more workers than these wait for one another.
_BEST_DEVICE_CHUNK = 1 << 21
_MOST_DEVICE_WORKERS = 4
# What a look at a tensor takes for each element it holds: the element, a copy to select in, masks.
_HELD_BYTES = 12
# Chunks that a worker takes at once where a tensor can be split between workers.
_STRIDE = 8


class Sink(Protocol):
    """Where results go: a `Writer`, or memory."""

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Take elements from `start` on of a tensor."""
        ...


class MemorySink:
    """Results in memory.

    Args:
        plan: what will be written.
    """

    def __init__(self, plan: dict[str, TensorMeta]) -> None:
        self.weights = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in plan.items()}

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Copy elements to their place, converted to the planned dtype."""
        self.weights[name].view(-1)[start : start + tensor.numel()] = tensor.to("cpu")


def run(
    jobs: Sequence[Job],
    sink: Sink,
    *,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    chunk: int | None = None,
    compiled: bool | None = None,
    finished: Set[str] = frozenset(),
    part: Callable[[str], int] = lambda _: 0,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Make every job's tensor and put it into `sink`.

    Args:
        jobs: what to make; those that share one method object of model scope are looked at together.
        sink: where results go.
        budget: bytes of working memory, for all workers together. A method that needs whole tensors (the SVD family) takes
            more where its largest tensor does.
        threads: workers; as many as the process may use cores when `None`, but at most four on a device.
        device: where to compute.
        chunk: elements of one model in a chunk, instead of what the budget and the cache suggest.
        compiled: use compiled loops where there are such (`soups.merging.kernels`); the bits are the same. `None`: if they were
            built.
        finished: names of tensors that the sink has already; they are looked at where a method needs the whole model, and
            not made.
        part: the part of the output (a shard) that a tensor is in; parts are made one after another.
        progress: told the bytes of sources that were finished with, from any thread.

    Raises:
        WeightsError: a result is not finite, with the model that is to blame where there is one.
    """
    check_device(device)
    on_cpu = torch.device(device).type == "cpu"
    threads = threads or (available_cores() if on_cpu else min(available_cores(), _MOST_DEVICE_WORKERS))
    if compiled is None:
        compiled = not kernels.unavailable()
    gate = _Gate(budget)

    def operands(job: Job, method: Method) -> Operands:
        count = len(job.models) + (job.base is not None)
        dtype = job.compute_dtype()
        # Statistics are read in float64, and methods make a product of each.
        each = dtype.itemsize * (2 * count + 6) + 16 * sum(map(len, job.statistics.values()))
        room = budget // (threads * each)
        best = _BEST_COMPILED_CHUNK if compiled and method.loops else _BEST_CHUNK
        size = chunk or max(BLOCK, min(room, best if on_cpu else _BEST_DEVICE_CHUNK))
        return Operands(
            job.key,
            job.meta.shape,
            job.models,
            job.base,
            unit=method.unit,
            chunk=size,
            dtype=dtype,
            device=device,
            # One half for task vectors that stay, one for what a look at a tensor holds.
            room=0 if chunk else budget // (2 * threads * _HELD_BYTES),
            holding=0 if chunk else budget // (2 * threads),
            into=job.meta.dtype,
            statistics=job.statistics,
        )

    with _one_thread_each(), kernels.compiling(compiled), _pool(threads) as (pool, stopped):
        visit = _stoppable(pool, stopped)
        # A look at a tensor would be spoilt by infinities; methods without one meet them in their result.
        looked_at = [job for job in jobs if job.method is not None and job.method.scope != "element"]
        finite = dict(zip(map(id, looked_at), visit(without_shared_infinities, looked_at), strict=True))
        jobs = [finite.get(id(job), job) for job in jobs]
        seen_all: dict[int, Any] = {}
        wide: dict[int, tuple[WholeModelMethod, list[Operands]]] = {}
        for job in jobs:
            if isinstance(job.method, WholeModelMethod) and job.method.scope == "model":
                wide.setdefault(id(job.method), (job.method, []))[1].append(operands(job, job.method))
        needed = {id(job.method) for job in jobs if job.key not in finished}
        for method, everything in wide.values():
            if id(method) not in needed:
                continue
            seen_all[id(method)] = method.observe_all(everything, visit)

        def work(job: Job, spans: Sequence[tuple[int, int]] | None) -> None:
            if job.method is None:
                for start, stop in spans or []:
                    _check_stopped(stopped)
                    source = job.models[0]
                    sink.write_flat(job.key, start, source.store.read_flat(source.key, start, stop))
                    progress((stop - start) * job.meta.dtype.itemsize)
                return
            source = operands(job, job.method)
            share = job.nbytes() / max(1, source.numel)
            with gate.hold(job.working_bytes()):
                seen = seen_all.get(id(job.method))
                if job.method.scope in ("row", "tensor"):
                    seen = job.method.observe(source)
                for start, stop in source.spans() if spans is None else spans:
                    _check_stopped(stopped)
                    result = job.method.combine(source.at(start, stop), seen)
                    if job.method.scope == "element" and not fits(result, job.meta.dtype):
                        mended = without_shared_infinities_between(job, start, stop)
                        result = job.method.combine(operands(mended, job.method).at(start, stop), seen)
                    else:
                        mended = job
                    check_finite(result, mended, start, stop)
                    sink.write_flat(
                        job.key, start, mended.infinities.put(result, start) if mended.infinities else result
                    )
                    progress(round(share * (stop - start)))

        def careful(job: Job, spans: Sequence[tuple[int, int]] | None) -> None:
            try:
                with torch.no_grad():
                    work(job, spans)
            except BaseException:
                stopped.set()  # at once: the others begin nothing new
                raise

        units: list[tuple[int, int, Job, Sequence[tuple[int, int]] | None]] = []
        for job in jobs:
            if job.key in finished:
                continue
            if job.method is not None and job.method.scope in ("row", "tensor"):
                units.append((part(job.key), -job.meta.numel, job, None))
                continue
            spans = _spans(job.meta.numel, operands(job, job.method).step if job.method else _BEST_CHUNK)
            units.extend((part(job.key), 0, job, spans[i : i + _STRIDE]) for i in range(0, len(spans), _STRIDE))
        # Tensors that one worker must do alone go first, the largest before others, so that none is left for the end.
        units.sort(key=lambda unit: unit[:2])
        _finish([pool.submit(careful, job, spans) for _, _, job, spans in units])


def _spans(numel: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: torch.device | str) -> None:
    """Check that torch can compute there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise ConfigError(
            f"Cannot compute on device {str(device)!r}: {str(error).splitlines()[0]} Choose another, or leave it out for the CPU."
        ) from error


def fits(result: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a merged chunk is finite in a dtype."""
    narrow = dtype.itemsize < 4 and dtype != torch.bfloat16
    return kernels.all_finite(result.to(dtype).float() if narrow else result)


def check_finite(result: Tensor, job: Job, start: int, stop: int) -> None:
    """Check that a merged chunk is finite in the output's dtype.

    Raises:
        WeightsError: naming the tensor, and the model that holds NaN or infinity, or the dtype that is too narrow.
    """
    if fits(result, job.meta.dtype):
        return
    check_sources(job, start, stop)
    if bool(torch.isfinite(result).all()):
        raise WeightsError(
            f"Tensor {job.key!r} of the result does not fit into {job.meta.dtype}: its largest element is "
            f"{float(result.abs().max()):.3g}. Choose bfloat16 or float32 as the output's dtype."
        )
    raise WeightsError(
        f"Tensor {job.key!r} of the result is not finite although every model is. Check weights and scales: weights that "
        f"sum to zero cannot be normalised."
    )


class _Gate:
    """Lets holders of memory in as long as the budget lasts; one alone may exceed it."""

    def __init__(self, budget: int) -> None:
        self._budget, self._used, self._changed = budget, 0, threading.Condition()

    @contextmanager
    def hold(self, need: int) -> Generator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + need <= self._budget)
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


@contextmanager
def _one_thread_each() -> Generator[None]:
    # Workers are the parallelism; and a sum's bits would depend on how many threads an operation was split over.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _pool(threads: int) -> Generator[tuple[ThreadPoolExecutor, threading.Event]]:
    stopped = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="soups-merge")
    try:
        yield pool, stopped
    except BaseException:
        stopped.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted."""


def _check_stopped(stopped: threading.Event) -> None:
    if stopped.is_set():
        raise _StoppedError


def _stoppable(pool: ThreadPoolExecutor, stopped: threading.Event) -> Callable[..., Iterable[Any]]:
    def visit(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        def guarded(item: Any) -> Any:
            _check_stopped(stopped)
            with torch.no_grad():
                return function(item)

        return pool.map(guarded, items)

    return visit


def _finish(futures: Sequence[Future[None]]) -> None:
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    errors = [error for future in done if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, _StoppedError)), errors[0])


__all__ = [
    "DEFAULT_BUDGET",
    "Chunk",
    "Job",
    "MemorySink",
    "Sink",
    "available_cores",
    "check_device",
    "check_finite",
    "run",
]
