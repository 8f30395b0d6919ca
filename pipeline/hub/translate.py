"""What the hub client's exceptions mean to the person at the keyboard.

Messages are made from the status and the hub's own error text only: addresses of a content network carry signatures
and never enter a message.
"""

from __future__ import annotations

from pipeline.errors import CorruptWeightsError, SourceError, SourceNotFoundError
from pipeline.hub.repository import Place, Repository


def translate(error: Exception, place: Place) -> SourceError:
    """Return the error to raise for a failed call about ``place``.

    Takes the exceptions of huggingface_hub and of its HTTP client, and the ``ValueError``, ``KeyError``, ``TypeError``
    and ``AttributeError`` that its parsers raise on a reply that does not come from a hub.
    """
    import httpx2
    from huggingface_hub import errors

    repository = place.repository
    match error:
        case errors.GatedRepoError():
            return SourceNotFoundError(
                f"{repository.title} is gated: its owner grants access person by person",
                code="source.gated",
                hint=f"accept its conditions at {repository.page_url}, then run: hf auth login",
            )
        case errors.RevisionNotFoundError():
            name = repository.name
            return SourceNotFoundError(
                f"{repository.title} exists on {repository.endpoint}, but has no revision {place.revision!r}",
                code="source.revision_not_found",
                hint=f"write {name}@BRANCH, @TAG or @COMMIT as listed at {repository.page_url}/tree/main, "
                f"or {name} alone",
            )
        case errors.RemoteEntryNotFoundError():
            missing = f"{place} is not there on {repository.endpoint}, although it was listed"
            return SourceNotFoundError(missing, code="source.file_not_found", hint="run the command again")
        case errors.RepositoryNotFoundError():
            return _no_repository(repository)
        case errors.HfHubHTTPError():
            return _by_status(error.response.status_code, error.server_message or "", place)
        case errors.OfflineModeIsEnabled():
            offline = f"{place} cannot be read: the hub client is in offline mode"
            return SourceNotFoundError(offline, code="source.offline", hint="unset HF_HUB_OFFLINE")
        case errors.HFValidationError():
            return not_a_name(str(place))
        case httpx2.TimeoutException():
            return _unreachable(place, "it did not answer in time")
        case httpx2.ConnectError():
            return _unreachable(place, "no connection could be made")
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return _unreachable(place, f"the connection failed ({type(error).__name__})")
        case _:
            return not_a_hub(place)


def not_a_name(text: str) -> SourceNotFoundError:
    """Return the error for a source that is neither a folder nor shaped like a repository."""
    return SourceNotFoundError(
        f"source {text!r:.200} is neither an existing folder nor of the form org/name[@revision]",
        code="source.bad_name",
        hint="give a local Hugging Face folder, for example ./my-model, a repository such as org/name@main, or "
        "s3://bucket/prefix",
    )


def not_a_hub(place: Place) -> SourceNotFoundError:
    """Return the error for a reply that no hub would give."""
    endpoint = place.repository.endpoint
    return SourceNotFoundError(
        f"{endpoint} answered for {place} with something that is no hub reply",
        code="source.not_a_hub",
        hint=f"check HF_ENDPOINT, now {endpoint}; it must be the base address of a hub",
    )


def shorter_than_listed(place: Place) -> CorruptWeightsError:
    """Return the error for a file that ends before the bytes that were asked for."""
    return CorruptWeightsError(
        f"{place} is shorter on {place.repository.endpoint} than its listing says",
        code="source.size",
        hint="choose another revision, or tell its publisher",
    )


def _no_repository(repository: Repository) -> SourceNotFoundError:
    return SourceNotFoundError(
        f"{repository.endpoint} has no repository {repository.name}, or it is private and the token does not open it",
        code="source.not_found",
        hint="check the name; for a private repository run: hf auth login (or set HF_TOKEN)",
    )


def _unreachable(place: Place, reason: str) -> SourceNotFoundError:
    endpoint = place.repository.endpoint
    return SourceNotFoundError(
        f"{place} cannot be read from {endpoint}: {reason}",
        code="source.unreachable",
        hint=f"check the network and HF_ENDPOINT, now {endpoint}; then run the command again",
    )


def _by_status(status: int, server_message: str, place: Place) -> SourceError:
    said = f": {server_message:.300}" if server_message else ""
    endpoint = place.repository.endpoint
    if status in (401, 403):
        return SourceNotFoundError(
            f"{endpoint} refuses access to {place} (HTTP {status}{said})",
            code="source.unauthorized",
            hint="run: hf auth login (or set HF_TOKEN to a token that may read it)",
        )
    if status == 404:
        return _no_repository(place.repository)
    if status == 416:
        return shorter_than_listed(place)
    if status == 429:
        return SourceNotFoundError(
            f"{endpoint} limits the rate of requests and kept doing so while {place} was read",
            code="source.rate_limited",
            hint="run the command again in some minutes; it continues. A token raises the limit: hf auth login",
        )
    return _unreachable(place, f"it answered HTTP {status}{said}")
