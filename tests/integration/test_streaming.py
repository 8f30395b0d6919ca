"""Conversions whose weights stay on the hub: the same bytes, little disk, and nothing wrong is published."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorruptWeightsError
from pipeline.graph.convert import RunOptions, convert
from pipeline.graph.dag import Kind
from pipeline.graph.outline import WEIGHTS_STAGE
from pipeline.observe.events import Event
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec, build_spec
from pipeline.tensors.local import read_folder_index
from tests.architectures import fuse_experts, make_model
from tests.loopback_hub import Fault, LoopbackHub

SEGMENT = 64 << 10
SENTENCES = [f"In the year {year} the ship left the harbour with {year % 97} men.\n" for year in range(1500, 1800)]


class Watching:
    """An event sink that looks at something whenever a unit ends."""

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        self.look = look

    def emit(self, event: Event) -> None:
        self.look()

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A hub that this process, hence also an inline worker, is led to. Segments are small, as the models are."""
    monkeypatch.setattr("pipeline.tensors.streamed.SEGMENT_BYTES", SEGMENT)
    with LoopbackHub() as running:
        for name, value in running.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield running


def settings_for(hub: LoopbackHub, cache: Path) -> Settings:
    return Settings(hub.url, None, cache, s3_endpoint=None, ray_address=None)


def make_spec(folder: Path, **changes: Any) -> ConversionSpec:
    for name, lines in {"calibration": SENTENCES[:200], "heldout": SENTENCES[200:]}.items():
        (folder / f"{name}.txt").write_text("".join(lines))
    base: dict[str, Any] = {
        "source": "org/tiny",
        "variants": ["gptq-w4-g64"],
        "calibration": {"text": str(folder / "calibration.txt"), "samples": 4, "length": 32, "slice_sequences": 2},
        "gates": {
            "heldout": str(folder / "heldout.txt"),
            "heldout_samples": 2,
            "heldout_length": 32,
            "generated_tokens": 8,
            **{f"max_{name}": None for name in ("relative_error", "kl", "perplexity_ratio", "degradations")},
        },
    }
    return build_spec(base | changes, "test")


def run(
    hub: LoopbackHub, folder: Path, name: str, *, stream: bool, work: Path | None = None, sink: Watching | None = None
) -> Path:
    """Convert in this process with a cache of its own and return the target."""
    target = folder / name / "out"
    target.mkdir(parents=True, exist_ok=True)
    cache = folder / "cache" / "bitmill"
    options = RunOptions(work or folder / name / "work", 1, inline=True, stream=stream)
    spec = make_spec(folder, targets=[str(target)])
    outcomes = convert(spec, settings_for(hub, cache), options, sink or Watching())
    assert all(outcome.locations for outcome in outcomes)
    return target


def contents(target: Path) -> dict[str, bytes]:
    releases = target / "releases"
    return {p.relative_to(releases).as_posix(): p.read_bytes() for p in sorted(releases.rglob("*")) if p.is_file()}


def bytes_under(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # what is fetched ahead comes and goes meanwhile
                total += os.stat(os.path.join(place, name)).st_size
    return total


def add_model(hub: LoopbackHub, folder: Path, num_blocks: int) -> dict[str, bytes]:
    source = make_model("llama", folder / f"model-{num_blocks}", num_hidden_layers=num_blocks)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub.add("org/tiny", files)
    return files


def test_a_streamed_conversion_gives_the_same_bytes_and_leaves_the_weights_on_the_hub(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    files = add_model(hub, tmp_path, 4)
    streamed = run(hub, tmp_path, "streamed", stream=True)
    cache = tmp_path / "cache" / "bitmill"
    assert not list((cache / "sources").rglob("*.safetensors"))
    asked = [text.removeprefix("bytes=").split("-") for text in hub.ranges("model.safetensors")]
    # Each segment came once, and was then read from this machine; what begins at 0 may be the header.
    segments = [(int(start), int(end) + 1) for start, end in asked if int(start)]
    size = len(files["model.safetensors"])
    assert sorted(segments) == [(s, min(s + SEGMENT, size)) for s in range(SEGMENT, size, SEGMENT)]
    fetched = run(hub, tmp_path, "fetched", stream=False)
    assert contents(streamed) == contents(fetched)


def test_experts_in_one_tensor_are_streamed_one_by_one(hub: LoopbackHub, tmp_path: Path) -> None:
    source = fuse_experts(make_model("qwen3_moe", tmp_path / "model"))
    hub.add("org/tiny", {path.name: path.read_bytes() for path in source.iterdir()})
    streamed = run(hub, tmp_path, "streamed", stream=True)
    assert not list((tmp_path / "cache" / "bitmill" / "sources").rglob("*.safetensors"))
    assert contents(streamed) == contents(run(hub, tmp_path, "fetched", stream=False))


def test_the_disk_that_streaming_takes_does_not_grow_with_depth(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.graph.outline.RANGES_BYTES", 6 * SEGMENT)
    for num_blocks in (4, 16):
        folder = tmp_path / str(num_blocks)
        folder.mkdir()
        monkeypatch.setenv("BITMILL_CACHE", str(folder / "cache" / "bitmill"))
        files = add_model(hub, folder, num_blocks)
        seen: list[int] = []

        def look(cache: Path = folder / "cache", seen: list[int] = seen) -> None:
            seen.append(bytes_under(cache))

        run(hub, folder, "run", stream=True, sink=Watching(look))
        companions = sum(len(data) for name, data in files.items() if name != "model.safetensors")
        # What the cache allows, one segment more before it makes room, and two on their way.
        assert max(seen) < companions + (6 + 1 + 2) * SEGMENT + 10_000
        assert len(files["model.safetensors"]) > (20 if num_blocks == 4 else 60) * SEGMENT


def test_a_block_is_fetched_while_the_one_before_is_computed(hub: LoopbackHub, tmp_path: Path) -> None:
    add_model(hub, tmp_path, 4)
    index = read_folder_index(tmp_path / "model-4")
    ends = [entry.end_bytes for name, (_, entry) in index.entries.items() if name.startswith("model.layers.0.")]
    last = (max(ends) - 1) // SEGMENT * SEGMENT
    came: list[bool] = []

    def look() -> None:
        # The only worker waits in this call until the embeddings' event is told: what arrives now is fetched ahead.
        if came or not list((tmp_path / "cache" / "bitmill" / "ranges").glob("[!.]*/*")):
            return
        deadline = time.monotonic() + 30
        while not any(text.startswith(f"bytes={last}-") for text in hub.ranges("model.safetensors")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        came.append(time.monotonic() <= deadline)
        assert not list((tmp_path / "streamed" / "work" / "merge").rglob("record.json"))

    run(hub, tmp_path, "streamed", stream=True, sink=Watching(look))
    assert came == [True]


def test_corrupt_bytes_from_the_hub_fail_the_job_and_the_next_run_is_sound(hub: LoopbackHub, tmp_path: Path) -> None:
    add_model(hub, tmp_path, 4)
    work = tmp_path / "work"
    start = 5 * SEGMENT
    # The network delivers one segment wrongly, once: whoever reads it computes from it.
    hub.faults.append(Fault("model.safetensors", flip=True, range=f"bytes={start}-{start + SEGMENT - 1}"))
    with pytest.raises(CorruptWeightsError, match="discarded") as caught:
        run(hub, tmp_path, "first", stream=True, work=work)
    assert caught.value.code == "source.digest"
    assert not list((tmp_path / "first" / "out").rglob("manifest.json"))
    left = {path.name for path in work.iterdir() if any(path.rglob("record.json"))}
    assert left <= {Kind.VERIFY.value}
    second = run(hub, tmp_path, "second", stream=True, work=work)
    assert contents(second) == contents(run(hub, tmp_path, "fetched", stream=False))


def test_results_of_a_streamed_run_are_not_believed_by_one_that_fetches(hub: LoopbackHub, tmp_path: Path) -> None:
    add_model(hub, tmp_path, 4)
    work = tmp_path / "work"
    start = 5 * SEGMENT
    hub.faults.append(Fault("model.safetensors", flip=True, range=f"bytes={start}-{start + SEGMENT - 1}"))

    class Stop(Exception):
        """Ends a run as a kill would."""

    def look() -> None:
        if any((work / "pack").rglob("record.json")):
            raise Stop

    with pytest.raises(Stop):
        run(hub, tmp_path, "streamed", stream=True, work=work, sink=Watching(look))
    assert list((work / WEIGHTS_STAGE).rglob("record.json"))
    with pytest.raises(CorruptWeightsError, match="discarded"):
        run(hub, tmp_path, "first", stream=False, work=work)
    again = run(hub, tmp_path, "second", stream=False, work=work)
    assert contents(again) == contents(run(hub, tmp_path, "alone", stream=False))


def test_a_segment_that_rots_in_the_cache_is_read_again_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    add_model(hub, tmp_path, 4)
    expected = contents(run(hub, tmp_path, "fetched", stream=False))
    ranges = tmp_path / "cache" / "bitmill" / "ranges"
    rotted: list[str] = []

    def look() -> None:
        if not rotted and any((tmp_path / "streamed" / "work" / "solve").rglob("record.json")):
            for path in ranges.glob("[!.]*/*"):
                path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
                rotted.append(path.name)

    assert contents(run(hub, tmp_path, "streamed", stream=True, sink=Watching(look))) == expected
    assert rotted
