"""What a release consists of, and the names under which it is found.

Layout of a target::

    releases/<namespace>/<name>/<revision>/…          the files, as engines read them
    releases/<namespace>/<name>/<revision>/manifest.json   written last: its presence means complete
    refs/<namespace>/<name>/<ref>                     which revision `main` is now

A revision is the fingerprint of everything its manifest says, so equal content has one revision and a manifest cannot
be edited unnoticed. The manifest holds neither times nor machines: an interrupted and an undisturbed run write the
same bytes.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from pipeline.errors import CorruptReleaseError, SpecError, StorageError
from pipeline.fingerprint import fingerprint
from pipeline.storage.objects import check_key

MANIFEST_NAME = "manifest.json"
RELEASES = "releases"
REFS = "refs"
MAX_NAME_CHARS = 96
NAME_PATTERN = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARS - 1}}}"
REVISION_PATTERN = r"[0-9a-f]{64}"

Name = Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")]
Sha256 = Annotated[str, StringConstraints(pattern=rf"^{REVISION_PATTERN}$")]


class ReleaseFile(BaseModel):
    """One file of a release."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Relative to the revision folder, with slashes."""
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _is_inside(cls, path: str) -> str:
        try:
            return check_key(path)
        except StorageError as error:  # pydantic reports ValueErrors with the place in the document
            raise ValueError(error.message) from error


class Manifest(BaseModel):
    """A complete release: its files and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    namespace: Name
    name: Name
    revision: Sha256
    files: tuple[ReleaseFile, ...]
    """Sorted by path; the manifest itself is not among them."""
    provenance: dict[str, Any]
    """What the files were made from; JSON values that depend on neither time nor machine."""
    verdict_passed: bool
    """Whether every gate passed; no ref may point at a release where it is false."""

    def to_bytes(self) -> bytes:
        """Return the one JSON text of this manifest, indented, in UTF-8."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False)
        return f"{text}\n".encode()


def make_manifest(
    namespace: str, name: str, files: tuple[ReleaseFile, ...], provenance: dict[str, Any], *, verdict_passed: bool
) -> Manifest:
    """Return the manifest of these files, whose revision is the fingerprint of all its other fields.

    Raises:
        SpecError: when the namespace or name cannot be part of a release's address.
    """
    check_name(namespace, "namespace")
    check_name(name, "name")
    manifest = Manifest(
        namespace=namespace,
        name=name,
        revision="0" * 64,
        files=tuple(sorted(files, key=lambda file: file.path)),
        provenance=provenance,
        verdict_passed=verdict_passed,
    )
    return manifest.model_copy(update={"revision": revision_of(manifest)})


def revision_of(manifest: Manifest) -> str:
    """Return the fingerprint of everything in a manifest but its revision."""
    return fingerprint(manifest.model_dump(mode="json", exclude={"revision"}))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest that was read at ``where``.

    Raises:
        CorruptReleaseError: when it is no manifest, or not the one that its revision stands for.
    """
    hint = "publish the release again"
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CorruptReleaseError(f"{where} is not a release's manifest: {place}: {first['msg']}", hint=hint) from error
    if revision_of(manifest) != manifest.revision:
        raise CorruptReleaseError(
            f"{where} was changed after it was published: its content does not have revision {manifest.revision}",
            hint=hint,
        )
    return manifest


def release_prefix(namespace: str, name: str, revision: str) -> str:
    """Return the key prefix of a revision's files, with a slash at its end."""
    return f"{RELEASES}/{namespace}/{name}/{revision}/"


def check_name(value: str, what: str) -> str:
    """Return ``value`` when it can be a namespace, name or ref.

    Raises:
        SpecError: otherwise.
    """
    if not re.fullmatch(NAME_PATTERN, value):
        raise SpecError(
            f"{value!r} cannot be the {what} of a release",
            code="spec.release_name",
            hint=f"use up to {MAX_NAME_CHARS} letters, digits, dots, underscores and hyphens, beginning with a letter "
            "or digit",
        )
    return value
