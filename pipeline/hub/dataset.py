"""One file of a dataset repository on the hub, for calibration or held-out text."""

from __future__ import annotations

import re
import time
from pathlib import Path

from pipeline.errors import SourceNotFoundError, SpecError
from pipeline.hub.client import HubClient, Sleep
from pipeline.hub.fetch import fetch_files
from pipeline.hub.repository import Repository, RepositoryKind
from pipeline.settings import Settings

_DATASET_FILE = re.compile(
    r"hub:(?P<name>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@:\s]+))?:(?P<path>[^:]+)", re.ASCII
)


def fetch_dataset_file(text: str, settings: Settings, *, sleep: Sleep = time.sleep) -> tuple[Path, str]:
    """Return the local path of a dataset's file and its provenance ``hub:org/name@<commit>:path``.

    The revision is pinned to its present commit first; the file is fetched and verified as weights are, so a rerun
    finds it.

    Args:
        text: ``hub:org/name[@revision]:path/in/repository``.
        settings: Endpoint, token and cache directory.
        sleep: Waits between attempts when the hub limits or drops us.

    Raises:
        SpecError: when ``text`` is not of that form.
        SourceNotFoundError: when the repository, revision or file is not there or not accessible.
        CorruptWeightsError: when the file's digest is not the one that the hub announced.
        DiskFullError: when the cache directory cannot take it.
    """
    match = _DATASET_FILE.fullmatch(text)
    if match is None:
        raise SpecError(
            f"{text!r} is not of the form hub:org/name[@revision]:path",
            code="spec.dataset",
            hint="for example hub:org/dataset@main:data/train.jsonl",
        )
    name, path = match["name"], match["path"]
    repository = Repository(RepositoryKind.DATASET, name, settings.hub_endpoint)
    client = HubClient(settings.find_hub_token(), sleep)
    commit, files = client.listing(repository, match["revision"])
    wanted = tuple(file for file in files if file.path == path)
    if not wanted:
        others = ", ".join(file.path for file in files[:5]) or "nothing"
        raise SourceNotFoundError(
            f"dataset {name}@{commit[:12]} has no file {path!r}",
            code="source.file_not_found",
            hint=f"it has {others}{', ...' if len(files) > 5 else ''}",
        )
    folder = settings.cache_dir / "datasets" / name / commit
    fetch_files(
        client.copier(repository, commit),
        name,
        wanted,
        folder,
        settings.cache_dir,
        on_progress=lambda path, done, total: None,
        on_wait=lambda reason: None,
        sleep=sleep,
    )
    return folder / path, f"hub:{name}@{commit}:{path}"
