"""A conversion is cancelled in every phase, one after the other, and goes on each time where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import GraphError
from pipeline.graph import assemble
from pipeline.graph.convert import RunOptions, VariantOutcome, convert
from pipeline.graph.stopping import CANCELLED
from pipeline.observe.events import (
    ClosingSink,
    Event,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    WorkersStarting,
)
from pipeline.settings import Settings
from pipeline.spec import build_spec
from pipeline.storage import running
from pipeline.storage.directory import DirectoryStore
from pipeline.storage.running import cancel_job, list_jobs

DEMO_MODEL = Path(__file__).parents[2] / "jobs" / "demo" / "model"
VARIANTS = ("rtn-w4-g128", "rtn-w8-g128")

Contents = dict[str, bytes]


class Cancelling(ClosingSink):
    """Cancels the job at the first event that is meant, and waits until the job could know.

    Attributes:
        events: What was said.
        cancelled_s: When the job was cancelled; 0 when it was not.
    """

    def __init__(self, work: Path, is_meant: Callable[[Event], bool]) -> None:
        self.events: list[Event] = []
        self.cancelled_s = 0.0
        self._store, self._is_meant = DirectoryStore(work), is_meant

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if not self.cancelled_s and self._is_meant(event):
            (job,) = list_jobs(self._store, datetime.now(UTC))
            assert (job.source, job.variants) == (str(DEMO_MODEL), VARIANTS)
            cancel_job(self._store, job.id, datetime.now(UTC))
            time.sleep(20 * running.LOOK_S)
            self.cancelled_s = time.monotonic()


class Silent(ClosingSink):
    """Lets the job be."""

    def emit(self, event: Event) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOOK_S", 0.02)
    monkeypatch.setattr(assemble, "plot_layer_error", lambda facts: b"")
    monkeypatch.setattr(assemble, "plot_size_quality", lambda facts: b"")


def run(folder: Path, sink: ClosingSink) -> tuple[VariantOutcome, ...]:
    """Convert the demo model."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    spec = build_spec(
        {
            "source": str(DEMO_MODEL),
            "variants": list(VARIANTS),
            "targets": [str(folder / "out")],
            "calibration": {"samples": 2, "length": 64},
            "gates": {"heldout_samples": 2, "heldout_length": 64, "generated_tokens": 8},
        },
        "test",
    )
    settings = Settings("http://127.0.0.1:9", None, folder / "cache", s3_endpoint=None, ray_address=None)
    options = RunOptions(work_dir=folder / "work", workers=1, inline=True)
    return convert(spec, settings, options, sink)


def published(folder: Path) -> Contents:
    """Return every file of every release by path."""
    releases = folder / "out" / "releases"
    return {path.relative_to(releases).as_posix(): path.read_bytes() for path in releases.rglob("*") if path.is_file()}


PHASES: dict[str, Callable[[Event], bool]] = {
    "the source is read": lambda event: isinstance(event, SourceAdvanced),
    "workers start": lambda event: isinstance(event, WorkersStarting),
    "units run": lambda event: isinstance(event, StageFinished) and not event.reused,
    "the first is judged": lambda event: isinstance(event, VariantJudged),
    "the first is published": lambda event: isinstance(event, Published),
}


def test_a_job_can_be_cancelled_in_every_phase_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "cancelled"
    for phase, is_meant in PHASES.items():
        sink = Cancelling(folder / "work", is_meant)
        with pytest.raises(GraphError, match="was cancelled") as caught:
            run(folder, sink)
        assert caught.value.code == CANCELLED
        assert time.monotonic() - sink.cancelled_s < 10, phase
        assert list_jobs(DirectoryStore(folder / "work"), datetime.now(UTC)) == ()
        complete = [event.variant for event in sink.events if isinstance(event, Published)]
        assert complete == (["rtn-w4-g128"] if phase == "the first is published" else []), phase
        assert len([path for path in published(folder) if path.endswith("manifest.json")]) == len(complete), phase
        assert bool(published(folder)) == bool(complete), phase
    assert all(outcome.locations for outcome in run(folder, Silent()))
    assert all(outcome.locations for outcome in run(tmp_path / "undisturbed", Silent()))
    assert published(folder) == published(tmp_path / "undisturbed")


def test_a_wish_that_comes_after_the_last_publication_changes_nothing(tmp_path: Path) -> None:
    def is_last(event: Event) -> bool:
        return isinstance(event, Published) and event.variant == VARIANTS[-1]

    sink = Cancelling(tmp_path / "work", is_last)
    outcomes = run(tmp_path, sink)
    assert sink.cancelled_s
    assert [len(outcome.locations) for outcome in outcomes] == [1, 1]
    assert list(DirectoryStore(tmp_path / "work").list(f"{running.FOLDER}/")) == []
