"""The gates: figures in, a Verdict out. Pure functions; who measured the figures does not matter here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pipeline.facts import Check, ModuleFacts, Quality, Sample, Verdict
from pipeline.spec import Budgets, PromptSpec
from pipeline.validate.generation import Continuation, judge_continuation


def check_accounting(
    source_names: Iterable[str], quantized: Iterable[str], kept: Mapping[str, str], dropped: Mapping[str, str]
) -> Check:
    """Return whether every source tensor was quantized, copied, or dropped with a reason.

    Args:
        source_names: Tensors of the source.
        quantized: Source tensors whose codes are in the release.
        kept: Source tensors copied, with reasons.
        dropped: Source tensors left out, with reasons.
    """
    wanted, taken = set(source_names), list(quantized)
    lost = sorted(wanted - set(taken) - set(kept) - set(dropped))
    twice = sorted(set(taken) & set(kept))
    counts = f"{len(taken)} quantized, {len(kept)} copied, {len(dropped)} dropped of {len(wanted)} source tensors"
    detail = counts if not lost else f"{counts}; unaccounted: {', '.join(lost[:5])}"
    detail += f"; both quantized and copied: {', '.join(twice[:5])}" if twice else ""
    return Check(name="accounting", passed=not lost and not twice, detail=detail)


def check_round_trip(num_proven: int, num_linears: int, problems: Sequence[str]) -> Check:
    """Return whether the written files hold exactly what they should.

    Args:
        num_proven: Quantized linears that were unpacked from their files to exactly the solver's codes and grids.
        num_linears: Quantized linears.
        problems: What was found wrong: linears that read back different, tensors that were not copied bit for bit.
    """
    counts = f"{num_proven} of {num_linears} quantized linears read back from their files bit for bit"
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Check(
        name="round_trip",
        passed=num_proven == num_linears and not problems,
        detail=f"{counts}; {'; '.join(problems[:3])}{more}"
        if problems
        else f"{counts}, and all copies are the source's",
    )


def check_scales(problems: Sequence[str], num_linears: int) -> Check:
    """Return whether all scales are finite, positive and normal in float16."""
    detail = problems[0] if problems else f"all scales of {num_linears} linears are finite and normal in float16"
    return Check(name="scales", passed=not problems, detail=detail)


def check_relative_error(modules: Sequence[ModuleFacts], budget: float | None) -> Check:
    """Return whether the relative output error of every quantized module is within budget."""
    quantized = [module for module in modules if module.group_size]
    worst = max(quantized, key=lambda module: module.relative_error)
    over = [module for module in quantized if budget is not None and not module.relative_error <= budget]
    detail = f"worst {worst.relative_error:.4f} ({worst.name})"
    if over:
        detail = f"{len(over)} modules above {budget}: " + ", ".join(
            f"{module.name} ({module.relative_error:.4f})" for module in over[:5]
        )
    return Check(name="relative_error", passed=not over, detail=detail, figures={"worst": worst.relative_error})


def check_degradations(modules: Sequence[ModuleFacts], budget: int | None) -> Check:
    """Return whether the solvers' fallbacks are within budget."""
    found = [(module.name, reason) for module in modules for reason in module.degradations]
    detail = "; ".join(f"{name}: {reason}" for name, reason in found[:5]) if found else "none"
    passed = budget is None or len(found) <= budget
    return Check(name="degradations", passed=passed, detail=detail, figures={"count": float(len(found))})


def check_divergence(quality: Quality, budgets: Budgets) -> Check:
    """Return whether KL divergence and perplexity against the source are within budget."""
    ratio = quality.perplexity / quality.source_perplexity
    faults = []
    if not (math.isfinite(quality.kl) and math.isfinite(quality.perplexity)):
        # Whatever the budgets: without one a figure is only not judged, but this is none.
        faults.append(f"KL {quality.kl}, perplexity {quality.perplexity}: the release does not compute")
    if budgets.max_kl is not None and not quality.kl <= budgets.max_kl:
        faults.append(f"KL {quality.kl:.4f} above {budgets.max_kl}")
    if budgets.max_perplexity_ratio is not None and not ratio <= budgets.max_perplexity_ratio:
        faults.append(f"perplexity ratio {ratio:.4f} above {budgets.max_perplexity_ratio}")
    detail = (
        "; ".join(faults)
        if faults
        else (f"KL {quality.kl:.4f}, perplexity {quality.perplexity:.2f} against {quality.source_perplexity:.2f}")
    )
    figures = {"kl": quality.kl, "perplexity_ratio": ratio, "top1_agreement": quality.top1_agreement}
    return Check(name="divergence", passed=not faults, detail=detail, figures=figures)


def check_generation(
    prompts: Sequence[PromptSpec], source: Sequence[Continuation], variant: Sequence[Continuation]
) -> Check:
    """Return whether every smoke prompt was continued as the spec expects, and degenerates only where the source does;
    how many were excused by that is said."""
    judged = [judge_continuation(*case) for case in zip(prompts, source, variant, strict=True)]
    faults = [item.fault for item in judged if item.fault]
    excused = [item.excused for item in judged if item.excused]
    same = sum(a.ids == b.ids for a, b in zip(source, variant, strict=True))
    detail = "; ".join(faults) if faults else f"{len(prompts)} prompts continued; {same} word for word as the source"
    if excused:
        detail += f"; {len(excused)} excused, as the source does the like: {'; '.join(excused)}"
    return Check(name="generation", passed=not faults, detail=detail)


def make_verdict(
    checks: Iterable[Check], budgets: Budgets, prompts: Sequence[PromptSpec], variant: Sequence[Continuation]
) -> Verdict:
    """Return the Verdict of all checks with the continuations as samples."""
    samples = (
        Sample(prompt=asked.prompt, expect=asked.expect, continuation=made.text, ids=made.ids)
        for asked, made in zip(prompts, variant, strict=True)
    )
    return Verdict(checks=tuple(checks), budgets=budgets, samples=tuple(samples))
