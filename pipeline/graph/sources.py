"""Sources in buckets: `hub` knows what a source is, `storage` how buckets are read, this brings them together."""

from __future__ import annotations

from pipeline.hub.bucket import Bucket
from pipeline.hub.source import Source, pin_source
from pipeline.settings import Settings


def pin(text: str, settings: Settings) -> Source:
    """Return the source that ``text`` means, pinned: a folder, a repository on a hub, or a folder in a bucket.

    Raises:
        SourceError: as ``pin_source``.
    """
    return pin_source(text, settings, _open_bucket)


def _open_bucket(url: str, settings: Settings) -> Bucket:
    # Loads boto3, which takes half a second that other sources need not pay.
    from pipeline.storage.bucket import SourceBucket

    return SourceBucket.at(url, settings.s3_endpoint)
