"""What a job does with stored outputs that were damaged since an earlier run finished them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.graph.convert import RunOptions, convert
from pipeline.observe.events import ClosingSink, Event, StageFinished, Warned
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec
from tests.factories import OPEN_GATES

MakeSpec = Callable[..., ConversionSpec]


class Heard(ClosingSink):
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def ran(self) -> list[StageFinished]:
        return [event for event in self.events if isinstance(event, StageFinished) and not event.reused]


def run(spec: ConversionSpec, settings: Settings, work: Path, target: Path) -> tuple[dict[str, bytes], Heard]:
    """Convert, and return every published file by path, with what was told."""
    heard = Heard()
    outcomes = convert(spec, settings, RunOptions(work, workers=2, inline=True), heard)
    assert all(outcome.locations for outcome in outcomes)
    releases = target / "releases"
    files = {p.relative_to(releases).as_posix(): p.read_bytes() for p in releases.rglob("*") if p.is_file()}
    shutil.rmtree(target)
    return files, heard


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("stage", ["pack", "outer"])
@pytest.mark.parametrize("damage", [flip, cut_off, remove])
def test_a_finished_output_that_was_damaged_is_computed_anew_before_it_is_published(
    stage: str,
    damage: Callable[[Path], None],
    make_spec: MakeSpec,
    settings: Settings,
    tmp_path: Path,
) -> None:
    spec, work, target = make_spec(gates=OPEN_GATES), tmp_path / "work", tmp_path / "out"
    first, _ = run(spec, settings, work, target)
    damage(min((work / stage).glob("*/*/output.safetensors")))
    second, heard = run(spec, settings, work, target)
    assert second == first
    assert len(heard.ran) == 1, "nothing else is done again"
    if damage is flip:
        assert any(isinstance(event, Warned) and "is damaged" in event.message for event in heard.events)
    third, heard = run(spec, settings, work, target)
    assert (third, heard.ran) == (first, [])
