"""What a conversion says while its source comes in."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path

from pipeline.graph.convert import fetch_source
from pipeline.hub.source import pin_source
from pipeline.observe.events import ClosingSink, Event, SourceAdvanced, Warned
from pipeline.settings import Settings
from tests.loopback_hub import LoopbackHub


def test_waiting_for_another_process_is_a_warning(settings: Settings, llama: Path) -> None:
    with LoopbackHub() as hub:
        commit = hub.add("org/model", llama)
        own = dataclasses.replace(settings, hub_endpoint=hub.url)
        folder = own.cache_dir / "sources" / "org/model" / commit
        folder.parent.mkdir(parents=True)
        other = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(other, fcntl.LOCK_EX)
        said: list[Event] = []

        class Sink(ClosingSink):
            def emit(self, event: Event) -> None:
                said.append(event)
                if isinstance(event, Warned):
                    os.close(other)

        fetched, _ = fetch_source(pin_source("org/model", own), own, Sink())
    assert fetched.folder == folder
    first, *later = said
    assert isinstance(first, Warned)
    assert str(folder) in first.message
    assert later
    assert all(isinstance(event, SourceAdvanced) for event in later)
