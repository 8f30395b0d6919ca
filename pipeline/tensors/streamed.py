"""Tensors read by byte range from far away, block by block, through a bounded cache on this machine.

A file is read in segments of ``SEGMENT_BYTES`` at multiples of that size. A segment that was read is kept, with a
checksum, in a cache that all processes of the machine share, so several units that read one block, or one tensor after
the other, cost one transfer. `StreamedTensors.expect` reads segments ahead in a thread of its own. Memory is one
segment besides the tensors that are returned, disk what the cache allows, whatever the size of the model.

Integrity. A hub announces the SHA-256 of whole files, against which no range can be checked. So the SHA-256 of every
tensor is written down when it is first read by anybody, and compared each time that it is read again by anybody: all
workers compute from the same bytes, or the job ends. `digest_tensors` reads a file from end to end, once, and gives the
digest of the file and of each of its tensors; whoever publishes compares the first with what was announced and the
others with what was written down.

Tensors are written down in groups (a block, what lies outside the blocks): who is the first to read a part of a group
reads the rest as well.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pipeline.errors import CorruptWeightsError, PipelineError
from pipeline.fingerprint import fingerprint
from pipeline.tensors.header import REFETCH_HINT, ReadRange, TensorEntry
from pipeline.tensors.index import WeightIndex
from pipeline.tensors.reader import digest_tensors, make_tensor, place_of

SEGMENT_BYTES = 32 << 20
"""Bytes of a request: below 10,000 requests for 300 GB, and little is read that is not wanted."""

MISMATCH = "source.digest"
"""Code of the error for bytes that are not those that were announced, or not those that were read before."""


class RangeCache(Protocol):
    """Files by name on this machine; one that is there may vanish at any time."""

    def find(self, name: str) -> Path | None:
        """Return the path of an entry, or None."""

    def add(self, name: str, file: Path) -> Path:
        """Make a file of a private folder the entry."""

    def drop(self, name: str) -> None:
        """The entry is gone."""

    def private_folder(self) -> AbstractContextManager[Path]:
        """Give a folder for one process alone."""

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Let one process or thread at a time make an entry."""

    def errors(self) -> AbstractContextManager[None]:
        """Turn errors of this machine's disk into ours."""


class DigestBook(Protocol):
    """SHA-256 of tensors by name, for groups of tensors by key, shared by all workers."""

    def known(self, key: str, names: Sequence[str]) -> Mapping[str, str] | None:
        """Return what is known of a group: what was written down, or what its files were found to hold; or None."""

    def write_down(self, key: str, digests: Mapping[str, str]) -> None:
        """Write down a group that was read for the first time.

        Raises:
            CorruptWeightsError: when somebody else has just written down something else.
        """


class StreamedTensors:
    """The tensors of one source, for one worker. ``expect`` may be called while ``read`` runs elsewhere.

    Attributes:
        groups: The tensors that are written down together, by the key of the group.
    """

    def __init__(
        self,
        index: WeightIndex,
        file_sizes: Mapping[str, int],
        digests: Mapping[str, str],
        read_range: ReadRange,
        cache: RangeCache,
        book: DigestBook,
        groups: Iterable[Sequence[str]],
    ) -> None:
        """Read nothing yet.

        Args:
            index: Where the tensors are.
            file_sizes: Sizes of the files that hold them.
            digests: The SHA-256 that was announced for each of these files.
            read_range: Reads bytes of a file from where it is.
            cache: Keeps segments.
            book: Keeps digests.
            groups: Names of tensors that are written down together; each tensor is in one group.
        """
        self._index, self._sizes, self._digests = index, file_sizes, digests
        self._read_range, self._cache, self._book = read_range, cache, book
        self.groups = {group_key(index, digests, names): tuple(names) for names in groups}
        self._group_of = {name: key for key, names in self.groups.items() for name in names}
        self._expected: dict[str, str] = {}
        self._ahead: ThreadPoolExecutor | None = None
        self._last: tuple[str, int, bytes] = ("", 0, b"")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors on the CPU, in the order of ``names``, in fresh memory of their own.

        Raises:
            SourceError: when the source cannot be read any more.
            CorruptWeightsError: when there is no such tensor, torch has no such dtype, or the bytes are not those that
                somebody read before.
        """
        found: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for name in names:
            found[name], digests[name] = self._tensor(name)
        for key in dict.fromkeys(self._group_of[name] for name in found):
            self._learn(key, digests)
        for name in found:
            if digests[name] != self._expected[name]:
                found[name] = self._read_again(name)
        return found

    def expect(self, names: Iterable[str]) -> None:
        """Start to read the segments of tensors that will be read soon; what fails is tried again by `read`."""
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, thread_name_prefix="bitmill-ahead")
        for file, number in self._segments(names):
            self._ahead.submit(self._fetch_ahead, file, number)

    def digest_tensors(self, file: str) -> tuple[str, dict[str, str]]:
        """Return the SHA-256 of a whole file and of each of its tensors, read from end to end.

        Segments that are in the cache are taken from there, as their bytes are what was computed from; others are not
        kept.

        Raises:
            SourceError: when the source cannot be read any more.
        """
        numbers = range(-(-self._sizes[file] // SEGMENT_BYTES))
        return digest_tensors(
            self._index, file, (self._cached(file, number) or self._from_source(file, number) for number in numbers)
        )

    def forget(self, file: str) -> None:
        """What this machine has of a file is gone, so that it is read from its source again."""
        self._last = ("", 0, b"")
        for number in range(-(-self._sizes[file] // SEGMENT_BYTES)):
            self._cache.drop(self._entry(file, number))

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)

    # Digests.

    def _learn(self, key: str, digests: Mapping[str, str]) -> None:
        """Know what a group's tensors must be: what was written down, or what they are now."""
        names = self.groups[key]
        if all(name in self._expected for name in names):
            return
        known = self._book.known(key, names)
        if known is None:
            known = {name: digests.get(name) or self._digest(name) for name in names}
            self._book.write_down(key, known)
        self._expected.update(known)

    def _digest(self, name: str) -> str:
        file, entry = place_of(self._index, name)
        hasher = hashlib.sha256()
        for part in self._parts(file, entry):
            hasher.update(part)
        return hasher.hexdigest()

    def _read_again(self, name: str) -> Tensor:
        """Return a tensor whose bytes were other than they were before, from its source this time."""
        self._last = ("", 0, b"")
        for file, number in self._segments((name,)):
            self._cache.drop(self._entry(file, number))
        tensor, digest = self._tensor(name)
        if digest != self._expected[name]:
            file = self._index.entries[name][0]
            raise CorruptWeightsError(
                f"tensor {name!r} of {file} came with SHA-256 {digest}, and before with {self._expected[name]}",
                code=MISMATCH,
                hint="run the command again; if it stays so, check any proxy or mirror between, or leave out --stream",
                context={"file": file, "tensor": name},
            )
        return tensor

    # Bytes.

    def _tensor(self, name: str) -> tuple[Tensor, str]:
        file, entry = place_of(self._index, name)
        hasher = hashlib.sha256()

        def fill(view: memoryview) -> None:
            done = 0
            for part in self._parts(file, entry):
                view[done : done + len(part)] = part
                hasher.update(part)
                done += len(part)

        return make_tensor(file, entry, fill), hasher.hexdigest()

    def _parts(self, file: str, entry: TensorEntry) -> Iterator[memoryview]:
        """Yield a tensor's bytes, segment by segment."""
        start = entry.start_bytes
        while start < entry.end_bytes:
            number, offset = divmod(start, SEGMENT_BYTES)
            if self._last[:2] != (file, number):
                self._last = (file, number, self._segment(file, number))
            part = memoryview(self._last[2])[offset : offset + entry.end_bytes - start]
            yield part
            start += len(part)

    def _segments(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """Return the segments that tensors lie in, in order, each once."""
        wanted = set()
        for name in names:
            file, entry = place_of(self._index, name)
            if entry.num_bytes:
                wanted |= {
                    (file, number)
                    for number in range(entry.start_bytes // SEGMENT_BYTES, (entry.end_bytes - 1) // SEGMENT_BYTES + 1)
                }
        return sorted(wanted)

    def _segment(self, file: str, number: int) -> bytes:
        data = self._cached(file, number)
        if data is not None:
            return data
        name = self._entry(file, number)
        with self._cache.alone(name):
            data = self._cached(file, number)
            if data is None:
                data = self._from_source(file, number)
                with self._cache.private_folder() as folder, self._cache.errors():
                    (folder / "segment").write_bytes(data + _checksum(data))
                    self._cache.add(name, folder / "segment")
        return data

    def _cached(self, file: str, number: int) -> bytes | None:
        """Return a segment that this machine has, whole and as it was written; one that is not is dropped."""
        path = self._cache.find(self._entry(file, number))
        if path is None:
            return None
        with self._cache.errors():
            try:
                found = path.read_bytes()
            except FileNotFoundError:  # it made room for something else
                return None
        start, end = self._bounds(file, number)
        data = found[: end - start]
        if len(data) != end - start or found[end - start :] != _checksum(data):
            self._cache.drop(path.name)
            return None
        return data

    def _from_source(self, file: str, number: int) -> bytes:
        start, end = self._bounds(file, number)
        data = self._read_range(file, start, end)
        if len(data) != end - start:
            short = f"{file} ends before byte {end}"
            raise CorruptWeightsError(short, code="source.truncated", hint=REFETCH_HINT, context={"file": file})
        return data

    def _fetch_ahead(self, file: str, number: int) -> None:
        try:
            if self._cache.find(self._entry(file, number)) is None:
                self._segment(file, number)
        except PipelineError:
            return  # whoever reads it will meet the same, and say so

    def _bounds(self, file: str, number: int) -> tuple[int, int]:
        return number * SEGMENT_BYTES, min((number + 1) * SEGMENT_BYTES, self._sizes[file])

    def _entry(self, file: str, number: int) -> str:
        return fingerprint([self._digests[file], number, SEGMENT_BYTES])


def _checksum(data: bytes) -> bytes:
    """Return what tells a segment from one that rotted on this disk; tensors' digests tell whether it was right."""
    return zlib.crc32(data).to_bytes(4, "little")


def group_key(index: WeightIndex, digests: Mapping[str, str], names: Iterable[str]) -> str:
    """Return the key that a group's digests are written down under: what identifies its tensors."""
    places = {}
    for name in sorted(names):
        file, entry = place_of(index, name)
        places[name] = [digests[file], entry.start_bytes, entry.end_bytes]
    return fingerprint(places)
