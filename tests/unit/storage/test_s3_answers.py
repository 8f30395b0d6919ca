"""What is made of the answers that a healthy server does not give: a local server that says what a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3
from botocore.response import StreamingBody

from pipeline.errors import (
    ConditionalWriteError,
    ConflictError,
    CorruptWeightsError,
    DiskFullError,
    PipelineError,
    StorageError,
    TargetUnavailableError,
)
from pipeline.fingerprint import digest_file
from pipeline.hub.fetch import fetch
from pipeline.hub.source import pin_source
from pipeline.settings import Settings
from pipeline.storage.bucket import SourceBucket
from pipeline.storage.objects import MISSING_OBJECT
from pipeline.storage.probe import probe
from pipeline.storage.s3 import S3Store, connect_s3

Answer = tuple[int, dict[str, str], bytes]


class Script(ThreadingHTTPServer):
    """Answers with ``answer(method, path, headers)`` and remembers the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[str, str, Any], Answer] = lambda *_: (200, {}, b"")
        self.requests: list[tuple[str, str, str | None]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Script
    # Clients wait for "100 Continue" before they send a body, which only this version says.
    protocol_version = "HTTP/1.1"

    def _reply(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        status, headers, body = self.server.answer(self.command, self.path, self.headers)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        # Said and not only done: a client that reuses the connection may not have seen yet that it is closed.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _reply

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def script() -> Iterator[Script]:
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def store(script: Script, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setattr("pipeline.storage.s3.MAX_ATTEMPTS", 2)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    return connect_s3("b-1", "models", f"http://127.0.0.1:{script.server_port}")


def error_answer(status: int, code: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said so</Message></Error>".encode()
    return status, {"Content-Type": "application/xml"}, body


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (412, "PreconditionFailed", ConflictError),
        (409, "ConditionalRequestConflict", ConflictError),
        (404, "NoSuchKey", ConflictError),
        (404, "NoSuchBucket", TargetUnavailableError),
        (403, "AccessDenied", TargetUnavailableError),
        (400, "AuthorizationHeaderMalformed", TargetUnavailableError),
        (500, "InternalError", TargetUnavailableError),
        (507, "InsufficientStorage", DiskFullError),
        (400, "QuotaExceeded", DiskFullError),
        (501, "NotImplemented", ConditionalWriteError),
        (400, "InvalidRequest", StorageError),
    ],
)
def test_each_refusal_has_its_error_with_place_and_reason(
    store: S3Store, script: Script, status: int, code: str, kind: type[PipelineError]
) -> None:
    script.answer = lambda *_: error_answer(status, code)
    with pytest.raises(StorageError) as caught:
        store.put("a", b"x", if_match='"1"')
    assert type(caught.value) is kind
    assert f"bucket 'b-1' at http://127.0.0.1:{script.server_port}" in caught.value.message
    assert caught.value.__cause__ is not None
    if kind is not ConflictError:
        assert caught.value.hint


def test_a_full_store_is_named_while_uploading_and_the_upload_is_given_up(
    store: S3Store, script: Script, tmp_path: Path
) -> None:
    def answer(method: str, path: str, _: Any) -> Answer:
        if method == "POST":
            return 200, {}, b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
        return (204, {}, b"") if method == "DELETE" else error_answer(507, "InsufficientStorage")

    script.answer = answer
    store.part_bytes = 10
    path = tmp_path / "file"
    path.write_bytes(b"x" * 25)
    with pytest.raises(DiskFullError, match="no space left in bucket 'b-1'"):
        store.upload(path, "file", digest_file(path))
    assert script.requests[-1][:2] == ("DELETE", "/b-1/models/file?uploadId=7")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_lost_answer_to_the_end_of_an_upload_is_no_failure_where_the_object_is_there(
    store: S3Store, script: Script, tmp_path: Path, is_there: bool
) -> None:
    """The first request completes the upload but its answer is lost; the retry finds no such upload any more."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 25)
    sha256 = digest_file(path)

    def answer(method: str, path: str, _: Any) -> Answer:
        if method == "POST" and "uploads" in path:
            return 200, {}, b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
        if method == "POST":
            num_tried = sum(asked == "POST" and "uploads" not in what for asked, what, _ in script.requests)
            return error_answer(500, "InternalError") if num_tried == 1 else error_answer(404, "NoSuchUpload")
        if method == "HEAD":
            facts = {"Content-Length": "25", "x-amz-meta-sha256": sha256 if is_there else "0" * 64}
            return 200, {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **facts}, b""
        return 200, {"ETag": '"1"'}, b""

    script.answer = answer
    store.part_bytes = 10
    if is_there:
        store.upload(path, "file", sha256)
    else:
        with pytest.raises(StorageError, match=r"writing file failed: HTTP 404"):
            store.upload(path, "file", sha256)
    assert "HEAD" in {asked for asked, *_ in script.requests}


def test_a_server_that_stumbles_once_is_asked_again(store: S3Store, script: Script) -> None:
    script.answer = lambda *_: (
        error_answer(503, "SlowDown") if len(script.requests) == 1 else (200, {"ETag": '"1"'}, b"")
    )
    assert store.put("a", b"x") == '"1"'
    assert len(script.requests) == 2


def test_a_server_that_keeps_failing_is_given_up(store: S3Store, script: Script) -> None:
    script.answer = lambda *_: error_answer(503, "SlowDown")
    with pytest.raises(TargetUnavailableError, match="HTTP 503"):
        store.read("a")
    assert len(script.requests) == 2


def test_a_broken_transfer_goes_on_where_it_broke(store: S3Store, script: Script) -> None:
    whole = bytes(range(200))

    def answer(_: str, __: str, headers: Any) -> Answer:
        if "Range" not in headers:
            return 200, {"Content-Length": "200", "ETag": '"1"'}, whole[:120]
        assert headers["If-Match"] == '"1"'
        return 206, {"ETag": '"1"', "Content-Range": "bytes 120-199/200"}, whole[120:]

    script.answer = answer
    assert b"".join(store.stream("a")) == whole
    assert [request[2] for request in script.requests] == [None, "bytes=120-199"]


def test_a_transfer_that_keeps_breaking_is_given_up(store: S3Store, script: Script) -> None:
    script.answer = lambda *_: (200, {"Content-Length": "200", "ETag": '"1"'}, b"")
    with pytest.raises(TargetUnavailableError, match=r"reading a broke 2 times, last at byte 0"):
        list(store.stream("a"))


def test_breaks_that_each_bring_bytes_are_not_counted_together(store: S3Store, script: Script) -> None:
    whole = bytes(range(200))

    def answer(_: str, __: str, headers: Any) -> Answer:
        start = int(headers["Range"].removeprefix("bytes=").split("-")[0]) if "Range" in headers else 0
        partial = {"Content-Range": f"bytes {start}-199/200"} if start else {}
        length = {"Content-Length": str(200 - start)}
        return 206 if start else 200, {"ETag": '"1"', **length, **partial}, whole[start : start + 20]

    script.answer = answer
    assert b"".join(store.stream("a")) == whole
    assert len(script.requests) == 10


def test_a_connection_whose_encryption_breaks_is_a_broken_transfer(
    store: S3Store, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StreamingBody.read
    broken = []

    def break_once(self: StreamingBody, amt: int | None = None) -> bytes:
        if broken:
            return read(self, amt)
        broken.append(True)
        raise urllib3.exceptions.SSLError("bad record mac")

    script.answer = lambda *_: (200, {"ETag": '"1"'}, b"content")
    monkeypatch.setattr(StreamingBody, "read", break_once)
    assert b"".join(store.stream("a")) == b"content"
    assert len(script.requests) == 2


def test_a_small_object_that_came_with_a_wrong_checksum_is_read_again(store: S3Store, script: Script) -> None:
    script.answer = lambda *_: (
        200,
        {"ETag": '"1"', "x-amz-checksum-crc32": "AAAAAA==" if len(script.requests) == 1 else "NhCmhg=="},
        b"hello",
    )
    blob = store.read("a")
    assert blob is not None
    assert (blob.data, len(script.requests)) == (b"hello", 2)


@pytest.mark.parametrize("use", [S3Store.read, lambda store, key: list(store.stream(key))])
def test_a_checksum_that_stays_wrong_is_an_error_of_the_store(
    store: S3Store, script: Script, use: Callable[[S3Store, str], object]
) -> None:
    script.answer = lambda *_: (200, {"ETag": '"1"', "x-amz-checksum-crc32": "AAAAAA=="}, b"hello")
    with pytest.raises(StorageError, match=r"bucket 'b-1' at .*reading a failed: Expected checksum AAAAAA==") as caught:
        use(store, "a")
    assert caught.value.hint
    assert len(script.requests) == (2 if use is S3Store.read else 1)


def test_a_damaged_download_leaves_no_file(store: S3Store, script: Script, tmp_path: Path) -> None:
    script.answer = lambda *_: (200, {"ETag": '"1"', "x-amz-checksum-crc32": "AAAAAA=="}, b"hello")
    with pytest.raises(StorageError, match="Expected checksum"):
        store.download("a", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_object_replaced_while_it_is_read_is_a_conflict(store: S3Store, script: Script) -> None:
    script.answer = lambda _, __, headers: (
        error_answer(412, "PreconditionFailed")
        if "If-Match" in headers
        else (200, {"Content-Length": "200", "ETag": '"1"'}, b"x" * 10)
    )
    with pytest.raises(ConflictError):
        list(store.stream("a"))


def test_a_range_is_of_the_content_that_is_meant_or_an_error(store: S3Store, script: Script) -> None:
    def read(etag: str, end: int = 6, *, is_whole: bool = False) -> bytes:
        return b"".join(store.stream_range("a", 2, end, etag, is_whole=is_whole))

    def answer(method: str, path: str, headers: Any) -> Answer:
        assert (headers["Range"], headers["If-Match"]) == ("bytes=2-5", wanted)
        return 206, {"ETag": '"1"', "Content-Range": "bytes 2-5/9"}, b"cdef"

    script.answer, wanted = answer, '"1"'
    assert read(wanted) == b"cdef"
    wanted = '"2"'
    with pytest.raises(ConflictError, match="another content"):  # a server that ignores the condition
        read(wanted)
    script.answer = lambda *_: error_answer(412, "PreconditionFailed")
    with pytest.raises(ConflictError):
        read(wanted)
    # A server that ignores ranges, and an object that is shorter than it was.
    script.answer = lambda *_: (200, {"ETag": '"1"'}, b"abcdefghi")
    with pytest.raises(StorageError, match="fewer than 6 bytes"):
        read('"1"')
    script.answer = lambda *_: error_answer(404, "NoSuchKey")
    with pytest.raises(StorageError) as caught:
        read('"1"')
    assert caught.value.code == MISSING_OBJECT


def test_a_whole_object_is_held_to_its_checksum(store: S3Store, script: Script) -> None:
    wrong = {"ETag": '"1"', "x-amz-checksum-crc32": "AAAAAA=="}
    script.answer = lambda *_: (200, wrong, b"abcdefghi")
    with pytest.raises(StorageError) as caught:
        b"".join(store.stream_range("a", 0, 9, '"1"', is_whole=True))
    assert caught.value.code == "storage.damaged_answer"


def test_a_damaged_object_leaves_nothing_of_a_source_behind(store: S3Store, script: Script, tmp_path: Path) -> None:
    """Nothing but the answer's own checksum could tell, so a rerun must not believe what came."""
    files = {"config.json": b"{}", "model.safetensors": b"abcdefghi"}
    damaged = [True]
    entries = "".join(
        f"<Contents><Key>models/{name}</Key><Size>{len(data)}</Size><ETag>&quot;1&quot;</ETag>"
        "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        for name, data in files.items()
    )

    def answer(method: str, path: str, headers: Any) -> Answer:
        if "list-type" in path:
            return 200, {}, f"<ListBucketResult>{entries}</ListBucketResult>".encode()
        name = path.rpartition("/")[2]
        is_wrong = damaged[0] and name == "model.safetensors"
        return 200, {"ETag": '"1"', **({"x-amz-checksum-crc32": "AAAAAA=="} if is_wrong else {})}, files[name]

    script.answer = answer
    endpoint = f"http://127.0.0.1:{script.server_port}"
    settings = Settings("", None, tmp_path, s3_endpoint=endpoint, ray_address=None)
    source = pin_source("s3://b-1/models", settings, lambda url, own: SourceBucket.at(url, own.s3_endpoint))
    with pytest.raises(CorruptWeightsError, match="another checksum") as caught:
        fetch(source, settings)
    assert caught.value.code == "source.digest"
    assert not list(tmp_path.rglob("model.safetensors*"))
    damaged[0] = False
    fetched = fetch(source, settings)
    assert (fetched.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_store_that_refuses_conditions_that_hold_is_unfit(store: S3Store, script: Script) -> None:
    refused, absent = error_answer(412, "PreconditionFailed"), error_answer(404, "NoSuchKey")
    script.answer = lambda method, *_: refused if method == "PUT" else absent
    with pytest.raises(ConditionalWriteError, match="refused to create an object that did not exist"):
        probe(store)


def test_uploads_that_are_not_ours_stay_even_when_the_server_lists_them(store: S3Store, script: Script) -> None:
    entry = "<Upload><Key>%s</Key><UploadId>%s</UploadId><Initiated>2026-01-01T00:00:00.000Z</Initiated></Upload>"
    keys = ("models/releases/a/1", "models/releases/ab/2", "releases/a/3", "models/releases/a/4")
    entries = "".join(entry % (key, key[-1]) for key in keys)
    listing = f"<ListMultipartUploadsResult>{entries}</ListMultipartUploadsResult>".encode()
    script.answer = lambda method, *_: (200, {}, listing) if method == "GET" else (204, {}, b"")
    swept = store.sweep_partial("releases/a/", datetime(2026, 1, 2, tzinfo=UTC))
    assert swept == ("releases/a/1", "releases/a/4")
    assert [path for method, path, _ in script.requests if method == "DELETE"] == [
        "/b-1/models/releases/a/1?uploadId=1",
        "/b-1/models/releases/a/4?uploadId=4",
    ]
    assert "prefix=models%2Freleases%2Fa%2F" in script.requests[0][1]
