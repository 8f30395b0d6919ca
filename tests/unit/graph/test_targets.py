"""Targets are opened before anything is computed, and a directory that was not there is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import TargetUnavailableError
from pipeline.graph.convert import open_targets
from pipeline.observe.events import ClosingSink, Event, Warned
from pipeline.settings import Settings


class Heard(ClosingSink):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def test_a_directory_that_is_created_is_told_and_one_that_is_there_is_not(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    heard = Heard()
    open_targets([str(tmp_path / "there"), str(tmp_path / "tpyo")], settings, heard)
    assert heard.events == [Warned(f"created the directory {tmp_path / 'tpyo'}, which was not there")]
    assert (tmp_path / "tpyo").is_dir()


def test_a_directory_whose_parent_is_not_there_is_refused_and_nothing_is_told(
    settings: Settings, tmp_path: Path
) -> None:
    heard = Heard()
    with pytest.raises(TargetUnavailableError, match="parent folder does not exist"):
        open_targets([str(tmp_path / "absent" / "out")], settings, heard)
    assert heard.events == []
