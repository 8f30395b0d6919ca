"""A job that is not wanted any more does not wait."""

from __future__ import annotations

import time

import pytest

from pipeline.errors import GraphError
from pipeline.graph import stopping
from pipeline.graph.stopping import CANCELLED, Stopping


def test_a_job_is_wanted_unless_somebody_says_otherwise() -> None:
    Stopping().check()
    Stopping().sleep(0.0)


def test_a_cancelled_job_says_how_it_goes_on() -> None:
    with pytest.raises(GraphError, match="the job was cancelled") as caught:
        Stopping(lambda: True).check()
    assert (caught.value.code, caught.value.hint) == (CANCELLED, "the same command continues where this one stopped")


def test_a_long_wait_ends_soon_after_a_wish_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(GraphError, match="was cancelled"):
        Stopping(lambda: len(slept) == 3).sleep(600.0)
    assert slept == [stopping.STEP_S] * 3


def test_a_wait_lasts_as_long_as_it_should() -> None:
    before_s = time.monotonic()
    Stopping().sleep(0.05)
    assert 0.05 <= time.monotonic() - before_s < 5
