"""The hub over HTTP: one repository at one commit, its listing and byte ranges of its files.

Ranges are read from ``/resolve/<commit>/`` as every hub serves it, so a hub's content network only has to honour
``Range``. The address is resolved anew for every request, because redirects carry signatures that expire. The client
drops ``Authorization`` when a redirect leaves the hub's origin (scheme, host and port); a test holds it to that.

A range is asked for in pieces of ``RANGE_BYTES``. A server that ignores ranges answers with the whole file (200): then
everything that is wanted is taken from that one reply, since each further request would send the file again.

Waits: a failed request is repeated at most ``MAX_ATTEMPTS`` times without progress, after what the hub asks for in
``RateLimit`` or ``Retry-After``, else after 1, 2, 4, ... seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import CorruptWeightsError, SourceError
from pipeline.hub.repository import CopyRange, Place, Repository, RepositoryKind, SourceFile
from pipeline.hub.selection import is_safe_path
from pipeline.hub.translate import not_a_hub, shorter_than_listed, translate

if TYPE_CHECKING:
    import httpx2

MAX_ATTEMPTS = 6
MAX_BACKOFF_S = 30.0
MAX_ASKED_WAIT_S = 600.0
"""A hub that asks for a longer wait gets an error instead: a person should decide."""

RANGE_BYTES = 64 * 1024 * 1024
"""Bytes of one request: small enough that an expiring address is renewed in time, large enough that 100 GB stay below
the few thousand requests that hubs allow in five minutes."""

API_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 15.0
RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

Sleep = Callable[[float], None]

_PARSER_FAILURES: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, AttributeError)
"""What the library's parsers raise on a reply that does not come from a hub."""


@dataclass(frozen=True)
class HubClient:
    """Reads of a hub with one identity.

    Attributes:
        token: Sent to the hub's own origin only; None reads anonymously, whatever is logged in on this machine.
        sleep: Waits between attempts.
    """

    token: str | None = field(repr=False)
    sleep: Sleep = time.sleep

    def listing(self, repository: Repository, revision: str | None) -> tuple[str, tuple[SourceFile, ...]]:
        """Return the commit (40 hex digits) that ``revision`` is now, and all files at it.

        Raises:
            SourceNotFoundError: when the repository or revision is not there, not accessible, or the hub is not.
        """
        from huggingface_hub import HfApi

        place = Place(repository, revision)
        api = HfApi(endpoint=repository.endpoint, token=self.token or False, library_name="bitmill")
        call: Callable[..., Any] = api.model_info if repository.kind is RepositoryKind.MODEL else api.dataset_info
        attempt = 0
        while True:
            try:
                info = call(repository.name, revision=revision, files_metadata=True, timeout=API_TIMEOUT_S)
                break
            except _failures() + _PARSER_FAILURES as error:
                attempt += 1
                # A first contact that is refused is a typo more often than an outage: say so at once.
                self._wait(error, attempt, place, retry_connect=False)
        commit = info.sha
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit) or info.siblings is None:
            raise not_a_hub(place)
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and commit != revision:
            raise SourceError(f"{repository.endpoint} gave commit {commit} for {place}", code="source.wrong_commit")
        return commit, tuple(_source_file(sibling, place) for sibling in info.siblings)

    def copier(self, repository: Repository, commit: str) -> CopyRange:
        """Return what copies ranges of a repository's files at a commit."""
        return lambda file, start, end, sink: self.copy_range(repository, commit, file.path, start, end, sink)

    def copy_range(
        self, repository: Repository, commit: str, path: str, start: int, end: int, sink: Callable[[bytes], object]
    ) -> None:
        """Give the bytes ``[start, end)`` of a file to ``sink`` in order, each byte once, over dropped connections.

        Raises:
            SourceNotFoundError: when the file or the hub is not there or not accessible.
            CorruptWeightsError: when the file is shorter than ``end``.
        """
        from huggingface_hub import hf_hub_url

        place = Place(repository, commit, path)
        url = hf_hub_url(
            repository.name, path, repo_type=repository.kind.value, revision=commit, endpoint=repository.endpoint
        )
        position, attempt = start, 0
        while position < end:
            before = position
            try:
                for chunk in self._open(url, position, end, place):
                    sink(chunk)
                    position += len(chunk)
                attempt = 0
            except _failures() as error:
                attempt = 1 if position > before else attempt + 1
                self._wait(error, attempt, place, retry_connect=True)

    def _open(self, url: str, start: int, end: int, place: Place) -> Iterator[bytes]:
        """Yield the bytes from ``start`` that one reply gives, as they come: a piece, or all up to ``end``."""
        import httpx2
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not marked as exported
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = build_hf_headers(token=self.token or False, library_name="bitmill")
        stop = min(start + RANGE_BYTES, end)
        # Compressed replies would make offsets meaningless.
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = httpx2.Timeout(API_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code not in (200, 206):
                raise _bad_reply(f"the reply to a range is HTTP {response.status_code}")
            is_whole = response.status_code == 200
            if is_whole:
                offset, stop = 0, end
            else:
                offset = _require_range(response, start, stop, place)
            for chunk in response.iter_raw():
                wanted = chunk[max(start - offset, 0) : max(stop - offset, 0)]
                offset += len(chunk)
                if wanted:
                    yield wanted
                if offset >= stop:
                    return
            if is_whole and _says_its_end(response):
                raise shorter_than_listed(place)
            raise _bad_reply("the reply ended before the range did")

    def _wait(self, error: Exception, attempt: int, place: Place, retry_connect: bool) -> None:
        """Sleep before the next attempt, or raise what ``error`` means when there should be none."""
        if attempt >= MAX_ATTEMPTS or not _is_temporary(error, retry_connect):
            raise translate(error, place) from error
        asked_s = _asked_wait_s(error)
        if asked_s is not None and asked_s > MAX_ASKED_WAIT_S:
            raise translate(error, place) from error
        self.sleep(asked_s if asked_s is not None else min(2.0 ** (attempt - 1), MAX_BACKOFF_S))


def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that a request ends with when the hub or the way to it is at fault."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    return (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled)


def _bad_reply(reason: str) -> httpx2.HTTPError:
    import httpx2

    return httpx2.RemoteProtocolError(reason)


def _is_temporary(error: Exception, retry_connect: bool) -> bool:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    match error:
        case HfHubHTTPError():
            return error.response.status_code in RETRIED_STATUSES
        case httpx2.ConnectError():
            return retry_connect
        case httpx2.TimeoutException() | httpx2.NetworkError() | httpx2.RemoteProtocolError():
            return True
        case _:
            return False


def _asked_wait_s(error: Exception) -> float | None:
    """Return the seconds that the reply asks to wait, or None when it does not say."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    try:
        # A date is compared with the server's own clock, so that ours does not matter.
        until, now = parsedate_to_datetime(asked), parsedate_to_datetime(headers.get("Date", ""))
        return max((until - now).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def _require_range(response: httpx2.Response, start: int, stop: int, place: Place) -> int:
    """Return the offset in the file at which a partial reply begins: the one that was asked for, in a file that reaches
    as far as its listing says.

    Raises:
        CorruptWeightsError: otherwise.
    """
    given = response.headers.get("Content-Range", "none")
    match = re.match(r"bytes (\d+)-\d+/(?P<total>\d+|\*)", given)
    if match is None or int(match[1]) != start:
        raise CorruptWeightsError(
            f"{place}: asked for bytes from {start}, the reply's Content-Range is {given:.60}",
            code="source.wrong_range",
            hint="check HF_ENDPOINT and any proxy between",
        )
    if match["total"] != "*" and int(match["total"]) < stop:
        raise shorter_than_listed(place)
    return start


def _says_its_end(response: httpx2.Response) -> bool:
    """Return whether a reply that ends is known to be whole; without either header a dropped one looks alike."""
    return "Content-Length" in response.headers or "Transfer-Encoding" in response.headers


def _source_file(sibling: Any, place: Place) -> SourceFile:
    """Return one entry of a listing, refused when it could leave the folder that it will be written to."""
    path, size = sibling.rfilename, sibling.size
    if not isinstance(path, str) or not is_safe_path(path):
        hostile = f"{place} lists a file called {path!r:.200}, which is no path inside a repository"
        raise SourceError(hostile, code="source.unsafe_path", hint="do not use this repository")
    if type(size) is not int or size < 0:
        unsized = f"{place} lists {path} without its size"
        raise SourceError(unsized, code="source.no_size", hint="the hub must answer model info with blobs=true")
    if sibling.lfs is not None:
        return SourceFile(path, size, sha256=_hex_or_none(sibling.lfs.sha256, 64))
    return SourceFile(path, size, git_sha1=_hex_or_none(sibling.blob_id, 40))


def _hex_or_none(value: Any, num_digits: int) -> str | None:
    is_digest = isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{num_digits}}}", value)
    return value if is_digest else None
