"""Sources in buckets: `hub` knows what a source is, `storage` how buckets are read, this module brings them together.

A bucket says no SHA-256 of its objects (its checksums are CRCs, its ETags digests of some uploads only), and the keys
of work units are made of the files' SHA-256. Fetched files are hashed as they come. For a source that is streamed each
weights file is read once from end to end before anything else is done, nothing of it being kept, which gives what a hub
would have announced and, in the same pass, what a unit `verify` finds out about its tensors: every later read is
compared with that, and no such unit has to run. The digests are written down in the work store under what the bucket
calls the content, so that the next run with the same work store begins at once.

Cost: as many bytes as the weights have, once, by the process that starts the conversion; ``READS_AT_ONCE`` requests at
a time, two digests in one thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from pipeline.errors import CorruptWeightsError, StorageError
from pipeline.fingerprint import fingerprint
from pipeline.graph.dag import Stored
from pipeline.graph.outline import proof_place
from pipeline.hub.bucket import Bucket
from pipeline.hub.client import Sleep
from pipeline.hub.fetch import OnProgress
from pipeline.hub.repository import SourceFile
from pipeline.hub.source import Source, pin_source, range_reader
from pipeline.settings import Settings
from pipeline.storage.work import NONDETERMINISTIC, WorkStore
from pipeline.tensors.index import WeightIndex
from pipeline.tensors.reader import digest_tensors
from pipeline.tensors.streamed import MISMATCH, SEGMENT_BYTES

DIGEST_STAGE = "digests"
"""Folder of the work store for the SHA-256 of files in buckets."""

READS_AT_ONCE = 4


def pin(text: str, settings: Settings, *, sleep: Sleep = time.sleep) -> Source:
    """Return the source that ``text`` means, pinned: a folder, a repository on a hub, or a folder in a bucket.

    Raises:
        SourceError: as ``pin_source``.
    """
    return pin_source(text, settings, _open_bucket, sleep=sleep)


def announce_weights(
    source: Source, index: WeightIndex, settings: Settings, work: WorkStore, on_progress: OnProgress
) -> Source:
    """Return the source with the SHA-256 of every weights file, as hubs say it of their own accord.

    A rerun reads the files only that no run with this work store has read to their ends.

    Raises:
        SourceNotFoundError: when the bucket cannot be read any more.
        CorruptWeightsError: when an object was replaced after the source was listed.
    """
    if source.bucket is None:
        return source
    files = {path: source.file(path) for path in source.weight_files}
    places = {path: _digest_place(source, file) for path, file in files.items()}
    known = work.lookup_all(places.values())
    found: dict[str, SourceFile] = {}
    for path, file in files.items():
        record = known.get(places[path])
        if record is not None:
            sha256 = str(record.summary["sha256"])
        else:
            sha256, tensors = digest_tensors(index, path, _read_ahead(source, settings, file, on_progress))
            with work.writing(*proof_place(sha256)) as writer:
                writer.finish({"tensors": tensors})
            _write_down(work, places[path], path, sha256)
        found[path] = replace(file, sha256=sha256)
    return replace(source, files=tuple(found.get(file.path, file) for file in source.files))


def forget_weights(source: Source, work: WorkStore) -> None:
    """What was written down of a bucket's weights files is gone: one of them was not what it was read as before, and it
    is not known which time was right."""
    if source.bucket is None:
        return
    for path in source.weight_files:
        file = source.file(path)
        if file.sha256 is not None:
            work.discard(*proof_place(file.sha256))
        work.discard(*_digest_place(source, file))


def _open_bucket(url: str, settings: Settings) -> Bucket:
    # Loads boto3, which takes half a second that other sources need not pay.
    from pipeline.storage.bucket import SourceBucket

    return SourceBucket.at(url, settings.s3_endpoint)


def _digest_place(source: Source, file: SourceFile) -> Stored:
    """Return where it is written down which SHA-256 an object has: under what its bucket calls its content."""
    named = [source.endpoint, source.location, file.path, file.size_bytes, file.etag]
    return Stored(DIGEST_STAGE, fingerprint(named))


def _write_down(work: WorkStore, place: Stored, path: str, sha256: str) -> None:
    try:
        with work.writing(*place) as writer:
            writer.finish({"path": path, "sha256": sha256})
    except StorageError as error:
        if error.code != NONDETERMINISTIC:
            raise
        raise CorruptWeightsError(
            f"two runs read different bytes of {path}",
            code=MISMATCH,
            hint="run the command again; if it stays so, check any proxy between, or leave out --stream",
        ) from error


def _read_ahead(source: Source, settings: Settings, file: SourceFile, on_progress: OnProgress) -> Iterator[bytes]:
    """Yield a file from its beginning to its end, some segments being read ahead."""
    read_range, size_bytes = range_reader(source, settings), file.size_bytes
    starts = iter(range(0, size_bytes, SEGMENT_BYTES))
    coming: deque[Future[bytes]] = deque()
    done = 0
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="bitmill-digest") as pool:
        try:
            while True:
                while len(coming) < READS_AT_ONCE and (start := next(starts, None)) is not None:
                    end = min(start + SEGMENT_BYTES, size_bytes)
                    coming.append(pool.submit(read_range, file.path, start, end))
                if not coming:
                    return
                data = coming.popleft().result()
                yield data
                done += len(data)
                on_progress(file.path, done, size_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
