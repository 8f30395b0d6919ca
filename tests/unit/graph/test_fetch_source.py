"""What a conversion says while its source comes in, and that it can be cancelled meanwhile."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path

import pytest

from pipeline.errors import GraphError
from pipeline.graph.convert import fetch_source
from pipeline.graph.stopping import CANCELLED, Stopping
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

        fetched, _ = fetch_source(pin_source("org/model", own), own, Sink(), Stopping())
    assert fetched.folder == folder
    first, *later = said
    assert isinstance(first, Warned)
    assert str(folder) in first.message
    assert later
    assert all(isinstance(event, SourceAdvanced) for event in later)


class Heard(ClosingSink):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def test_a_job_that_waits_for_another_process_can_be_cancelled(settings: Settings, llama: Path) -> None:
    with LoopbackHub() as hub:
        commit = hub.add("org/model", llama)
        own = dataclasses.replace(settings, hub_endpoint=hub.url)
        folder = own.cache_dir / "sources" / "org/model" / commit
        folder.parent.mkdir(parents=True)
        other = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(other, fcntl.LOCK_EX)
        sink = Heard()
        with pytest.raises(GraphError, match="was cancelled") as caught:
            fetch_source(pin_source("org/model", own), own, sink, Stopping(lambda: bool(sink.events)))
        os.close(other)
    assert caught.value.code == CANCELLED
    assert not list(folder.rglob("*.safetensors*"))


def test_a_cancelled_fetch_stops_between_files_and_the_next_one_goes_on(settings: Settings, llama: Path) -> None:
    with LoopbackHub() as hub:
        hub.add("org/model", llama)
        own = dataclasses.replace(settings, hub_endpoint=hub.url)
        source = pin_source("org/model", own)
        sink = Heard()
        with pytest.raises(GraphError, match="was cancelled"):
            fetch_source(source, own, sink, Stopping(lambda: len(sink.events) > 2))
        before = len(hub.requests)
        folder = own.cache_dir / "sources" / "org/model" / str(source.commit)
        done = {path.name for path in folder.iterdir() if path.suffix != ".part"}
        assert done
        fetched, _ = fetch_source(source, own, Heard(), Stopping())
        assert not done & {request.path.rpartition("/")[2] for request in hub.requests[before:]}
    assert {path.name for path in fetched.folder.iterdir()} >= {*done, "model.safetensors"}
