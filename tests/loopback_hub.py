"""A hub on 127.0.0.1 (or another address of the test's): the read side of the hub protocol over real HTTP, with faults
on request.

    with LoopbackHub(token="secret", cdn=True) as hub:
        commit = hub.add("org/model", folder)
        run_command(env={**os.environ, **hub.environment(cache)})

The unmodified huggingface_hub client works against it. Large-file (LFS) content is served by a second server, the
"CDN", when there is one; both record every request with its headers.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote

LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".parquet")
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass(frozen=True)
class Blob:
    """Content of a file and the identities that a hub gives it."""

    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_sha1

    def tree_entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_sha1, "size": len(self.content)}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry

    def sibling(self, path: str, with_blobs: bool) -> dict[str, Any]:
        if not with_blobs:
            return {"rfilename": path}
        entry: dict[str, Any] = {"rfilename": path, "size": len(self.content), "blobId": self.git_sha1}
        if self.is_lfs:
            entry["lfs"] = {"sha256": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    """A repository: branches and tags, and every commit that ever was."""

    kind: str
    name: str
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with requests whose file (or API address) ends with ``path``, for the next ``times`` of them.

    The first ``skip`` of them go well. API requests know ``status`` only; of files, only GET is affected. One of:
    answer ``status``; drop the connection after ``drop_after`` bytes of the reply; stall after ``stall_after`` bytes
    until the hub closes; flip the bits of the content; ignore the range. Without a length said first when ``chunked``.
    With ``range`` only requests with that Range header are affected.
    """

    path: str
    times: int = 1
    skip: int = 0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    stall_after: int | None = None
    flip: bool = False
    ignore_range: bool = False
    range: str = ""
    chunked: bool = False


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, label: str, hub: LoopbackHub, handler: type[BaseHTTPRequestHandler]) -> None:
        self.label, self.hub = label, hub
        self.connections: set[socket.socket] = set()
        super().__init__((hub.address, 0), handler)
        # Threads are joined when the server closes, after their connections have been shut down.
        self.daemon_threads = False
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.hub.address}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests die on purpose; what a handler did wrong shows as a failed request."""

    def close(self) -> None:
        self.shutdown()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster
        self.server_close()
        self.thread.join()


class LoopbackHub:
    """A running hub. ``url`` is its endpoint; ``requests`` what it and its CDN were asked."""

    def __init__(
        self, root: Path | None = None, *, token: str | None = None, cdn: bool = False, address: str = "127.0.0.1"
    ) -> None:
        """Serve ``root/models/<org>/<name>/`` and ``root/datasets/<org>/<name>/`` (when given), and what is added.

        With a token every request to the hub needs it; with a CDN, LFS content is redirected to another port.
        """
        self.token, self.address = token, address
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, tuple[str, Blob]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stalled = threading.Event()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        for plural, kind in KINDS.items():
            for folder in sorted((root / plural).glob("*/*")) if root is not None else ():
                self.add(f"{folder.parent.name}/{folder.name}", folder, kind=kind)
        self._hub = _Server("hub", self, HubHandler)
        self._cdn = _Server("cdn", self, CdnHandler) if cdn else None
        self.url = self._hub.url
        self.cdn_url = self._cdn.url if self._cdn else None

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop both servers and drop their connections."""
        self.closing.set()
        self._hub.close()
        if self._cdn:
            self._cdn.close()

    def add(
        self,
        name: str,
        files: Path | Mapping[str, bytes],
        *,
        kind: str = "model",
        revision: str = "main",
        gated: bool = False,
    ) -> str:
        """Commit a folder or a mapping as the whole content of a branch; return the commit."""
        if isinstance(files, Path):
            found = (path for path in sorted(files.rglob("*")) if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        blobs = {path: Blob(content, path.endswith(LFS_ENDINGS)) for path, content in sorted(files.items())}
        identity = json.dumps([kind, name, {path: blob.etag for path, blob in blobs.items()}])
        commit = hashlib.sha1(identity.encode()).hexdigest()
        repo = self.repos.setdefault((kind, name), Repo(kind, name))
        repo.gated, repo.refs[revision], repo.commits[commit] = gated, commit, blobs
        self.blobs.update({blob.sha256: (path, blob) for path, blob in blobs.items()})
        return commit

    def environment(self, cache_dir: Path) -> dict[str, str]:
        """Return the variables that make a command use this hub, its token, and a cache of its own."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache_dir / "hf"), "BITMILL_CACHE": str(cache_dir / "bitmill")}
        return {**own, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": self.address, "HF_TOKEN": self.token or ""}

    def ranges(self, path: str) -> list[str]:
        """Return the Range headers of the content requests for files ending with ``path``, in order."""
        with self._lock:
            asked = [request for request in self.requests if request.method == "GET" and request.path.endswith(path)]
        return [request.headers.get("range", "") for request in asked if "/api/" not in request.path]

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def take_fault(self, path: str, asked: str = "") -> Fault | None:
        """Return the fault that is due for a content request, counting it down."""
        with self._lock:
            for fault in self.faults:
                if not path.endswith(fault.path) or fault.times == 0 or (fault.range and fault.range != asked):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output clean; ``hub.requests`` is the log."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        # The raw path: revisions are quoted with their slashes.
        self.server.hub.record(Request(self.server.label, self.command, self.path, headers))
        length = int(headers.get("content-length", "0"))
        self.body = self.rfile.read(length) if length else b""
        raw_path, _, query = self.path.partition("?")
        self.route([part for part in raw_path.split("/") if part], parse_qs(query))

    def route(self, parts: list[str], query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes, headers: Mapping[str, str], *, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def chunks(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.json({"error": message}, status, {**named, "X-Error-Message": message, **(headers or {})})

    def content(self, path: str, blob: Blob, headers: Mapping[str, str]) -> None:
        """Serve a file's content or a range of it, with the fault that is due."""
        fault = (
            self.server.hub.take_fault(path, self.headers.get("Range", "")) if self.command == "GET" else None
        ) or Fault(path)
        if fault.status:
            return self.error(fault.status, "", "as the test asked", fault.headers)
        data = bytes(byte ^ 0xFF for byte in blob.content) if fault.flip else blob.content
        start, end = 0, len(data)
        status, headers = 200, {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        asked = self.headers.get("Range")
        if asked and not fault.ignore_range:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end) if last else end
            if start >= len(data):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(data)}"
        if fault.chunked:
            return self.chunks(status, data[start:end], headers)
        body, cut = data[start:end], fault.drop_after if fault.stall_after is None else fault.stall_after
        self.reply(status, body if cut is None else body[:cut], headers, length=len(body))
        if fault.stall_after is not None:
            self.server.hub.stalled.set()
            self.server.hub.closing.wait()
        if cut is not None:
            self.close_connection = True
        return None


class HubHandler(_Handler):
    """The hub's own addresses."""

    def route(self, parts: list[str], query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hub.token and sent and sent != hub.token:
            return self.error(401, "", "Invalid credentials in Authorization header")
        if hub.token and not sent:
            return self.error(401, "RepoNotFound", "Invalid username or password.")
        if parts == ["api", "whoami-v2"]:
            return self.json({"name": "tester", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        is_api = parts[:1] == ["api"]
        parts = parts[1:] if is_api else parts
        kind = KINDS.get(parts[0], "model") if parts else "model"
        parts = parts[1:] if parts and parts[0] in KINDS else parts
        if is_api and not parts:
            return self.json([self._info(repo, "main", False) for repo in hub.repos.values() if repo.kind == kind])
        repo = hub.repos.get((kind, "/".join(parts[:2]))) or hub.repos.get((kind, "/".join(parts[:1])))
        if repo is None:
            return self.error(404, "RepoNotFound", "Repository not found")
        rest = parts[repo.name.count("/") + 1 :]
        return self._api(repo, rest, query) if is_api else self._resolve(repo, rest)

    def _api(self, repo: Repo, rest: list[str], query: dict[str, list[str]]) -> None:
        fault = self.server.hub.take_fault(self.path.partition("?")[0])
        if fault is not None:
            return self.error(fault.status, "", "as the test asked", fault.headers)
        action, revision = rest[0] if rest else "revision", unquote(rest[1]) if len(rest) > 1 else "main"
        if action == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            return self.json({"branches": branches, "tags": [], "converts": []})
        commit = repo.resolve(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if action == "revision":
            return self.json(self._info(repo, commit, "true" in query.get("blobs", [""])[0].lower()))
        if action == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths", [])
            return self.json([files[path].tree_entry(path) for path in wanted if path in files])
        if action == "tree":
            return self._tree(
                files, unquote(rest[2]) if len(rest) > 2 else "", query.get("recursive", [""])[0].lower() == "true"
            )
        return self.error(404, "", f"no such route: {action}")

    def _info(self, repo: Repo, revision: str, with_blobs: bool) -> dict[str, Any]:
        commit = repo.resolve(revision) or ""
        siblings = [blob.sibling(path, with_blobs) for path, blob in repo.commits.get(commit, {}).items()]
        gated = "manual" if repo.gated else False
        about = {"_id": "0" * 24, "id": repo.name, "modelId": repo.name, "private": False, "gated": gated}
        return {**about, "sha": commit, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

    def _tree(self, files: Mapping[str, Blob], under: str, recursive: bool) -> None:
        prefix = f"{under}/" if under else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if under and not inside:
            return self.error(404, "EntryNotFound", f"{under} does not exist")
        folders = {path[: i + len(prefix)] for path in inside for i, c in enumerate(path[len(prefix) :]) if c == "/"}
        entries = [
            {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders
        ]
        entries += [blob.tree_entry(path) for path, blob in inside.items()]
        shown = [entry for entry in entries if recursive or "/" not in str(entry["path"])[len(prefix) :]]
        return self.json(sorted(shown, key=lambda entry: str(entry["path"])))

    def _resolve(self, repo: Repo, rest: list[str]) -> None:
        if len(rest) < 3 or rest[0] != "resolve":
            return self.error(404, "", "no such route")
        if repo.gated:
            # As on the public hub: everybody may list a gated repository, few may read what is in it.
            return self.error(403, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted")
        commit, path = repo.resolve(unquote(rest[1])), "/".join(unquote(part) for part in rest[2:])
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {unquote(rest[1])}")
        blob = repo.commits[commit].get(path)
        if blob is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"'}
        if blob.is_lfs and self.server.hub.cdn_url:
            linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
            signed = f"{self.server.hub.cdn_url}/{blob.sha256}/{quote(path)}?signature=secret-signature"
            return self.reply(302, b"", {**headers, **linked, "Location": signed})
        return self.content(path, blob, headers)


class CdnHandler(_Handler):
    """Content by digest at signed addresses. Like an object store, it refuses a second kind of credentials."""

    def route(self, parts: list[str], query: dict[str, list[str]]) -> None:
        path, blob = self.server.hub.blobs.get(parts[0], ("", None))
        if blob is None or query.get("signature") != ["secret-signature"]:
            return self.error(403, "", "bad signature")
        if "Authorization" in self.headers:
            return self.error(400, "", "only one auth mechanism allowed")
        return self.content(path, blob, {"ETag": f'"{blob.sha256}"'})
