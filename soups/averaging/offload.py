"""Updates in the background: averages on the CPU of weights on a GPU, without holding up training.

An update first copies the weights to the host. On CUDA the copies go to page-locked memory on a stream of their own, and the
device goes on working; elsewhere they are plain copies. A thread then takes the copies into the averages while the next batch
runs. The price is one copy of the weights on the host for all averages that are updated together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Offload:
    """Host copies of some tensors, and the one thread that works on them.

    Args:
        tensors: group number to the tensors of that group, all of them on one device.
    """

    def __init__(self, tensors: Mapping[int, list[Tensor]]) -> None:
        self._tensors = dict(tensors)
        self._device = next(tensor.device for group in tensors.values() for tensor in group)
        cuda = self._device.type == "cuda"
        self.host = {
            index: [torch.empty_like(tensor, device="cpu", pin_memory=cuda) for tensor in group]
            for index, group in tensors.items()
        }
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._copied: torch.cuda.Event | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="averaging")
        self._work: Future[None] | None = None

    def take(self) -> None:
        """Copy the tensors as they are now, or queue that on the device; the work before must be settled."""
        if self._stream is None:
            self._copy()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy()
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def _copy(self) -> None:
        for index, group in self._tensors.items():
            for target, tensor in zip(self.host[index], group, strict=True):
                target.copy_(tensor, non_blocking=True)
                if self._stream is not None:
                    # Should the tensor be freed meanwhile, its memory is not given away before the copy is made.
                    tensor.record_stream(self._stream)

    def release(self) -> None:
        """Let the device wait for its copies before anything that is queued from now on changes the tensors."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def start(self, work: Callable[[], None]) -> None:
        """Do `work` in the thread as soon as the copies are there."""
        copied = self._copied

        def run() -> None:
            if copied is not None:
                copied.synchronize()
            with torch.no_grad():  # a thread has a gradient mode of its own
                work()

        self._work = self._thread.submit(run)

    def settle(self) -> None:
        """Wait for the work; an error in it is raised here."""
        work, self._work = self._work, None
        if work is not None:
            work.result()
