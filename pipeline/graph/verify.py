"""A published release, asked again: from its storage alone, and in an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.facts import Check, ReleaseFacts
from pipeline.formats.loaders import Contents, limits
from pipeline.settings import Settings
from pipeline.storage.locate import LocatedRelease, download_release, locate_release, verify_release_files
from pipeline.validate.engines.environment import check_engine
from pipeline.validate.release import ReleaseModel, check_release, read_facts

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

    Args:
        location: As ``locate_release`` takes it.
        engine: ``transformers``, or None.
        settings: Where things are.
        on_line: Told what takes long.

    Raises:
        PipelineError: when the release cannot be found or read at all, or the engine cannot be set up.
    """
    located = locate_release(location, settings)
    problems = verify_release_files(located)
    counted = f"{len(located.manifest.files)} files have the sizes and SHA-256 of the manifest"
    checks = [Check(name="digests", passed=not problems, detail="; ".join(problems[:5]) or counted)]
    if not problems:
        folder = local_folder(located, settings)
        facts = read_facts(folder)
        checks += check_release(folder, facts, facts.generated_tokens)
        if engine is not None:
            checks.append(_check_engine(engine, folder, facts, settings, on_line))
    return Verification(f"{located.namespace}/{located.name}", located.revision, tuple(checks))


def local_folder(located: LocatedRelease, settings: Settings) -> Path:
    """Return a folder with the release's files: its own when it is on this machine, else a verified copy."""
    if located.local_path is not None:
        return located.local_path
    folder = settings.cache_dir / "releases" / located.namespace / located.name / located.revision
    return download_release(located, folder)


def _check_engine(
    engine: str, folder: Path, facts: ReleaseFacts, settings: Settings, on_line: Callable[[str], None]
) -> Check:
    model = ReleaseModel(folder)
    model.attach()
    prompts = [(s.prompt, model.tokenizer.encode(s.prompt, with_special=True)) for s in facts.verdict.samples]
    known = [limit.text for limit in limits(Contents.of_release(facts)) if limit.loader == engine]
    return check_engine(engine, folder, model.logits, prompts, VERIFY_TOKENS, settings.cache_dir, on_line, known)


def inspect(location: str, settings: Settings) -> tuple[LocatedRelease, ReleaseFacts]:
    """Return where a release is and everything that it says about itself.

    Raises:
        PipelineError: when it cannot be found or read.
    """
    located = locate_release(location, settings)
    return located, read_facts(local_folder(located, settings))
