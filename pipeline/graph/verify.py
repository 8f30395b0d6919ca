"""A published release, asked again: from its storage alone, and in an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from pipeline.facts import FACTS_FILE, Check, ReleaseFacts
from pipeline.formats.loaders import Contents
from pipeline.graph.engines import ask_engine
from pipeline.settings import Settings
from pipeline.storage.locate import (
    LocatedRelease,
    copy_release,
    locate_release,
    read_release_file,
    verify_release_files,
)
from pipeline.storage.temporaries import private_folder
from pipeline.validate.release import check_release, parse_facts, read_facts

CARD_FILE = "README.md"
VERIFY_TOKENS = 32
"""Tokens that an engine is asked to generate for each prompt."""


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        release: ``namespace/name``.
        revision: The revision that was checked.
        checks: In the order in which they were made.
    """

    release: str
    revision: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(location: str, engine: str | None, settings: Settings, on_line: Callable[[str], None]) -> Verification:
    """Check a release: digests, structure, generation by the project's own loader, and an engine if one is named.

    A release that is not on this machine is transferred once, to a folder in the cache directory that is removed again;
    what was there before proves nothing about what the storage holds now.

    Args:
        location: As ``locate_release`` takes it.
        engine: ``transformers``, or None.
        settings: Where things are.
        on_line: Told what takes long.

    Raises:
        PipelineError: when the release cannot be found or read at all, or the engine cannot be set up.
        DiskFullError: when the cache directory cannot take a copy.
    """
    located = locate_release(location, settings)
    with ExitStack() as stack:
        if located.local_path is not None:
            folder, problems = located.local_path, verify_release_files(located)
        else:
            folder = stack.enter_context(private_folder(settings.cache_dir / "verify"))
            problems = copy_release(located, folder)
        counted = f"{len(located.manifest.files)} files have the sizes and SHA-256 of the manifest"
        checks = [Check(name="digests", passed=not problems, detail="; ".join(problems[:5]) or counted)]
        if not problems:
            facts = read_facts(folder)
            checks += check_release(folder, facts, facts.generated_tokens)
            if engine is not None:
                prompts = [sample.prompt for sample in facts.verdict.samples]
                asked = (prompts, VERIFY_TOKENS, Contents.of_release(facts))
                checks.append(ask_engine(engine, folder, *asked, settings, on_line))
    return Verification(f"{located.namespace}/{located.name}", located.revision, tuple(checks))


def inspect(location: str, settings: Settings) -> tuple[LocatedRelease, ReleaseFacts]:
    """Return where a release is and everything that it says about itself; reads no other file of it.

    Raises:
        PipelineError: when it cannot be found or read, or its facts are not those of its manifest.
    """
    located = locate_release(location, settings)
    return located, parse_facts(read_release_file(located, FACTS_FILE), located.uri)


def read_card(location: str, settings: Settings) -> bytes:
    """Return a release's card as it was published, Markdown in UTF-8; reads no other file of it.

    Raises:
        PipelineError: when it cannot be found or read, or is not that of the manifest.
    """
    return read_release_file(locate_release(location, settings), CARD_FILE)
