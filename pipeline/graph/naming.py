"""Under what the releases of a conversion are published, known and checked before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import SpecError
from pipeline.hub.source import Source
from pipeline.spec import ConversionSpec
from pipeline.storage.manifest import MAX_NAME_CHARS, check_name

DEFAULT_NAMESPACE = "local"
DEFAULT_PREFIX = "model"
"""Of a folder whose name has no letter or digit that an address could hold."""


@dataclass(frozen=True)
class ReleaseNames:
    """The addresses of a conversion's releases.

    Attributes:
        namespace: First part of each.
        by_variant: Second part of each, by the variant's name, in the order of the spec.
        caution: What a person should know about how they were found; empty when there is nothing.
    """

    namespace: str
    by_variant: Mapping[str, str]
    caution: str = ""

    def address(self, variant: str) -> str:
        """Return ``namespace/name`` of a variant's release."""
        return f"{self.namespace}/{self.by_variant[variant]}"


def name_releases(spec: ConversionSpec, source: Source) -> ReleaseNames:
    """Return the names of the releases: the spec's prefix, else the source's, with the variants' names appended.

    A repository's name is taken as it is or not at all. A folder, here or in a bucket, is called what its owner likes:
    what an address cannot hold is left out of its name, which the caution says.

    Raises:
        SpecError: when one of them cannot be the name of a release.
    """
    variants = [variant.name for variant in spec.variants]
    caution = ""
    if spec.release:
        namespace, slash, prefix = spec.release.partition("/")
        if not slash or not namespace or not prefix or "/" in prefix:
            raise SpecError(f"release {spec.release!r} is not namespace/name", hint="for example --release team/model")
    elif not source.is_on_hub:
        room = MAX_NAME_CHARS - max(len(f"-{variant}") for variant in variants)
        own = source.name.rpartition("/")[2]
        namespace, prefix = DEFAULT_NAMESPACE, _publishable(own, room)
        if prefix != own:
            caution = (
                f"the folder's name {own!r} cannot be part of a release's: releases are called "
                f"{namespace}/{prefix}-VARIANT (choose another name with --release NAMESPACE/NAME)"
            )
    else:
        namespace, slash, prefix = source.name.rpartition("/")
        namespace = namespace if slash else DEFAULT_NAMESPACE
    names = {variant: f"{prefix}-{variant}" for variant in variants}
    _require_publishable(namespace, names.values())
    return ReleaseNames(namespace, names, caution)


def _publishable(name: str, room: int) -> str:
    """Return what of a name can begin a release's, at most ``room`` characters (but one) of it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-").rstrip("-") or DEFAULT_PREFIX
    return name[: max(room, 1)]


def _require_publishable(namespace: str, names: Iterable[str]) -> None:
    try:
        check_name(namespace, "namespace")
        for name in names:
            check_name(name, "name")
    except SpecError as error:
        hint = f"choose another with --release NAMESPACE/NAME (the variant's name is appended): {error.hint}"
        raise SpecError(error.message, code=error.code, hint=hint) from error
