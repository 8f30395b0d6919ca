"""The weights of the next block on their way to an accelerator while the block before it is computed there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""A block's checkpoint tensors by local name."""


class Ahead:
    """Reads the block that is expected in a thread of its own, and copies it to the device from pinned memory on a
    stream of its own: neither waits for what is computed, nor is it waited for.

    Whoever is about to pass a block expects the one after it first. So two blocks are there at most: the next one, and
    the one at work, which text may pass in several spans.
    """

    def __init__(self, read: Callable[[int], Weights], device: str) -> None:
        """Expect nothing yet.

        Args:
            read: Gives a block's tensors on the CPU, by its number.
            device: Where they are to be, ``cuda`` or ``cpu``.
        """
        self._read, self._device = read, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bitmill-block-ahead")
        self._expected: dict[int, Future[Weights]] = {}
        self._stream: torch.cuda.Stream | None = None

    def expect(self, index: int) -> None:
        """Begin to fetch a block, unless that has begun, and let go of all but the one before it."""
        for other in self._expected.keys() - {index - 1, index}:
            self._expected.pop(other).cancel()
        if index not in self._expected:
            self._expected[index] = self._thread.submit(self._fetch, index)

    def get(self, index: int) -> Weights | None:
        """Return a block that was expected, on the device, once it is there; None for any other.

        Raises:
            PipelineError: what reading it has raised; who asks again has it read again.
        """
        fetched = self._expected.get(index)
        if fetched is None:
            return None
        try:
            weights = fetched.result()
        except BaseException:
            del self._expected[index]
            raise
        if self._stream is not None:
            computing = torch.cuda.current_stream()
            for tensor in weights.values():
                # Its memory is the copying stream's: it is not to be used again before what reads it now has ended.
                tensor.record_stream(computing)
        return dict(weights)

    def close(self) -> None:
        """Fetch no more."""
        self._expected.clear()
        self._thread.shutdown(cancel_futures=True)

    def _fetch(self, index: int) -> Weights:
        weights = self._read(index)
        if self._device == "cpu":
            return weights
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            pinned = {name: tensor.pin_memory() for name, tensor in weights.items()}
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
        # Of this thread alone: pinned memory must outlive the copies.
        self._stream.synchronize()
        return moved
