"""Digests of files, remembered while the files stay as they are, so that 100 GB are hashed once and not in every run.

A record lies in the cache directory, never in the folder that it is about. It is believed for a file whose size,
modification time and change time are still those of when it was hashed; anything else is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.disk import save_file, write_error
from pipeline.errors import StorageError
from pipeline.fingerprint import digest_bytes

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Digests:
    """The identities that a hub may know a file by.

    Attributes:
        sha256: SHA-256 of the content.
        git_sha1: Git's blob id (SHA-1 over a header and the content); empty where it was not asked for.
    """

    sha256: str
    git_sha1: str


class ContentHasher:
    """Computes the digests of a file whose size is known beforehand."""

    def __init__(self, size_bytes: int, *, with_git: bool) -> None:
        self._sha256 = hashlib.sha256()
        # Hubs know small files by this only; they know large ones, where it would cost time, by SHA-256.
        self._git_sha1 = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False) if with_git else None

    def update(self, data: bytes) -> None:
        """Take the next bytes of the content."""
        self._sha256.update(data)
        if self._git_sha1 is not None:
            self._git_sha1.update(data)

    def update_from(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Take a file's content, telling ``on_bytes`` how many bytes have been taken so far."""
        done = 0
        with path.open("rb") as handle:
            while chunk := handle.read(CHUNK_BYTES):
                self.update(chunk)
                done += len(chunk)
                on_bytes(done)

    def digests(self) -> Digests:
        """Return the digests of what was taken."""
        return Digests(self._sha256.hexdigest(), self._git_sha1.hexdigest() if self._git_sha1 is not None else "")


class DigestRecords:
    """What is known of the files in one folder.

    A record that is absent or unreadable knows nothing; it is written again. Two processes that write at once lose
    one's additions, which costs a rehash and nothing else.
    """

    def __init__(self, cache_dir: Path, folder: Path) -> None:
        self._folder = folder
        self._path = cache_dir / "digests" / f"{digest_bytes(str(folder).encode())}.json"
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            self._files: dict[str, object] = dict(data["files"]) if data["folder"] == str(folder) else {}
        except (OSError, ValueError, KeyError, TypeError):
            self._files = {}

    def measure(self, path: str, on_bytes: Callable[[int], None], *, with_git: bool) -> Digests:
        """Return the digests of a file as it is now, from the record where it can be believed.

        Args:
            path: The file, relative to the folder.
            on_bytes: Told how many bytes are done.
            with_git: Whether the git blob id is wanted too.

        Raises:
            OSError: when the file cannot be read.
        """
        state = _state(self._folder / path)
        known = self._believed(path, state)
        if known is not None and (known.git_sha1 or not with_git):
            on_bytes(state["size_bytes"])
            return known
        hasher = ContentHasher(state["size_bytes"], with_git=with_git)
        hasher.update_from(self._folder / path, on_bytes)
        digests = hasher.digests()
        # The state from before hashing: a change meanwhile makes the record unbelievable instead of wrong.
        self._remember(path, digests, state)
        return digests

    def recall(self, path: str) -> Digests | None:
        """Return the digests of a file that is as it was when they were taken, else None.

        Raises:
            OSError: when there is no such file.
        """
        return self._believed(path, _state(self._folder / path))

    def remember(self, path: str, digests: Digests) -> None:
        """Record the digests of a file that was just written with them.

        Raises:
            DiskFullError: when there is no space for the record.
            StorageError: when the record cannot be written for another reason.
        """
        self._remember(path, digests, _state(self._folder / path))

    def _believed(self, path: str, state: dict[str, int]) -> Digests | None:
        known = self._files.get(path)
        if not isinstance(known, dict) or any(known.get(key) != value for key, value in state.items()):
            return None
        sha256, git_sha1 = known.get("sha256"), known.get("git_sha1")
        return Digests(sha256, git_sha1) if isinstance(sha256, str) and isinstance(git_sha1, str) else None

    def _remember(self, path: str, digests: Digests, state: dict[str, int]) -> None:
        self._files[path] = {**state, **asdict(digests)}
        data = json.dumps({"folder": str(self._folder), "files": self._files}, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._path, (data.encode(),))
        except OSError as error:
            raise storage_error(error, self._path, len(data)) from error


def storage_error(error: OSError, path: Path, needed_bytes: int) -> StorageError:
    """Return what a failed write of ``needed_bytes`` more bytes to ``path``, a file of the cache, means."""
    return write_error(
        error,
        path,
        needed_bytes,
        elsewhere="set BITMILL_CACHE to a larger disk",
        check="check BITMILL_CACHE and its permissions",
    )


def _state(path: Path) -> dict[str, int]:
    status = os.stat(path)
    return {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
