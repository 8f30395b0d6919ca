"""What ends a job before its time: a wish to cancel it, which every phase looks for.

A phase that takes long asks ``check`` between its parts, and waits with ``sleep``. What the job has stored by then
stays, so the same command continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import GraphError

CANCELLED = "graph.cancelled"
"""Code of the error that ends a job which is not wanted any more."""

STEP_S = 0.5
"""Longest sleep between two looks."""


def cancelled(reason: str = "the job was cancelled") -> GraphError:
    """Return the error that ends a job which is not wanted any more."""
    return GraphError(reason, code=CANCELLED, hint="the same command continues where this one stopped")


@dataclass(frozen=True)
class Stopping:
    """Knows whether a job is wanted still; the default is always.

    Attributes:
        is_cancelled: Whether it is not; cheap to ask often.
    """

    is_cancelled: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Return when the job is wanted still.

        Raises:
            GraphError: with the code ``CANCELLED`` when it is not.
        """
        if self.is_cancelled():
            raise cancelled()

    def sleep(self, seconds: float) -> None:
        """Wait, as long as the job is wanted.

        Raises:
            GraphError: with the code ``CANCELLED`` when it is not.
        """
        end_s = time.monotonic() + seconds
        self.check()
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, STEP_S))
            self.check()
