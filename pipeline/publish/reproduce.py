"""How to make a release again and judge it by the same gates: a command, and a spec file where flags cannot say it."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from pipeline.errors import SpecError
from pipeline.facts import CalibrationFacts, ReleaseFacts, SourceFacts, SourcePlace, weights_by_width
from pipeline.precision import Precision
from pipeline.spec import Budgets, CalibrationSpec, GateSpec, PromptSpec, VariantSpec, parse_variant, resolve_budgets

BUILTIN = "builtin"


def reproduce_spec(facts: ReleaseFacts) -> str | None:
    """Return the YAML of the spec file with what flags cannot say; None when they can say everything."""
    document: dict[str, Any] = {}
    if not _is_short_name(facts.variant):
        document["variants"] = [facts.variant.model_dump(mode="json", exclude_defaults=True)]
    if calibration := _calibration(facts.calibration):
        document["calibration"] = calibration
    if gates := _gates(facts):
        document["gates"] = gates
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True) if document else None


def reproduce_command(facts: ReleaseFacts) -> str:
    """Return the command that makes the same weights, with ``spec.yaml`` where ``reproduce_spec`` returns text."""
    source, calibration, quality, default = facts.source, facts.calibration, facts.quality, GateSpec()
    words = ["bitmill", "convert", _source_word(source)]
    words += ["--variant", facts.variant.name] if _is_short_name(facts.variant) else []
    words += ["--spec", "spec.yaml"] if reproduce_spec(facts) is not None else []
    words += ["--calibration", _text_flag(calibration.text)]
    words += ["--samples", str(calibration.samples), "--length", str(calibration.length)]
    words += ["--seed", str(calibration.seed)] if calibration.seed else []
    heldout = _text_flag(quality.heldout_text)
    words += ["--heldout", heldout] if heldout != default.heldout else []
    if quality.heldout_samples != default.heldout_samples:
        words += ["--heldout-samples", str(quality.heldout_samples)]
    if quality.heldout_length != default.heldout_length:
        words += ["--heldout-length", str(quality.heldout_length)]
    for check in facts.verdict.checks:
        words += ["--engine", check.engine] if check.engine else []
    words += ["--precision", calibration.precision] if calibration.precision is not Precision.BFLOAT16 else []
    return shlex.join([*words, "--to", "releases"])


def _source_word(source: SourceFacts) -> str:
    match source.place:
        case SourcePlace.FOLDER:
            return f"./{source.name}"
        case SourcePlace.HUB:
            return f"{source.name}@{source.commit}"
        case SourcePlace.BUCKET:
            return source.name


def _calibration(calibration: CalibrationFacts) -> dict[str, Any]:
    """Return what calibration was told otherwise than by default, besides what flags say."""
    keys = ("slice_sequences", "shrinkage", "experts", "expert_shrinkage", "min_expert_tokens")
    told = {key: getattr(calibration, key) for key in keys}
    default = CalibrationSpec()
    other = {key: value for key, value in told.items() if value is not None and value != getattr(default, key)}
    return CalibrationSpec(**other).model_dump(mode="json", include=set(other))


def _gates(facts: ReleaseFacts) -> dict[str, Any]:
    """Return what the gates were told otherwise than by default: a release that needed it would fail without."""
    default, verdict = GateSpec(), facts.verdict
    usual = resolve_budgets(default, facts.variant, weights_by_width(facts.modules))
    budgets = {key: getattr(verdict.budgets, key) for key in Budgets.model_fields}
    gates: dict[str, Any] = {key: value for key, value in budgets.items() if value != getattr(usual, key)}
    prompts = tuple(PromptSpec(prompt=sample.prompt, expect=sample.expect) for sample in verdict.samples)
    if prompts and prompts != default.prompts:
        gates["prompts"] = [prompt.model_dump(mode="json", exclude_defaults=True) for prompt in prompts]
    if facts.generated_tokens != default.generated_tokens:
        gates["generated_tokens"] = facts.generated_tokens
    return gates


def _text_flag(provenance: str) -> str:
    """Return what the flag takes: the provenance of a shipped text names its part, the flag does not."""
    return BUILTIN if provenance.startswith(f"{BUILTIN}:") else provenance


def _is_short_name(variant: VariantSpec) -> bool:
    try:
        return parse_variant(variant.name) == variant
    except SpecError:
        return False
