"""What a release says of its experts: how many tokens each was calibrated on, and what that weakens."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.facts import ModuleFacts
from pipeline.spec import CalibrationSpec, ExpertStatistics, Method, VariantSpec


def expert_degradations(tokens: int | None, calibration: CalibrationSpec) -> tuple[str, ...]:
    """Return what was done otherwise than asked for a quantized linear of an expert that the router sent ``tokens``
    calibration tokens; nothing for other linears (None), and nothing where every expert sees all tokens."""
    if tokens is None or calibration.experts is ExpertStatistics.ALL or tokens >= calibration.min_expert_tokens:
        return ()
    if tokens:
        asked = calibration.min_expert_tokens
        return (f"the router sent {tokens} calibration tokens to this expert, {asked} are asked for",)
    unseen = "the router sent no calibration token to this expert"
    if calibration.experts is ExpertStatistics.SHRINKAGE:
        return (f"{unseen}: its statistics are those of all tokens",)
    return (f"{unseen}: it was rounded to nearest",)


def expert_cautions(modules: Sequence[ModuleFacts], calibration: CalibrationSpec) -> tuple[str, ...]:
    """Return what is to be said when experts' statistics are of fewer tokens than their linears have inputs."""
    if calibration.experts is not ExpertStatistics.ROUTED:
        return ()
    short = [m for m in modules if m.expert_tokens is not None and m.expert_tokens < m.in_features]
    if not short:
        return ()
    return (
        f"{len(short)} linears of experts were calibrated on fewer tokens than they have inputs, so damping decides in "
        "part: more samples, or calibration.experts: all or shrinkage, would leave fewer",
    )


def scaling_cautions(modules: Sequence[ModuleFacts], variant: VariantSpec) -> tuple[str, ...]:
    """Return what is to be said when activation-aware scaling could not be done for some linears."""
    if not variant.method.has_scales:
        return ()
    left = [m for m in modules if m.group_size and m.awq_exponent is None]
    if not left:
        return ()
    quantized = sum(1 for m in modules if m.group_size)
    return (
        f"{len(left)} of {quantized} linears have no activation-aware scales, as no layer before them can take up the "
        "inverse: their groups' ranges were searched, and they were "
        + ("solved as they are" if variant.method.codes is Method.GPTQ else "rounded to nearest"),
    )
