"""From finished units to a release: facts, verdict, files in their final layout.

The folder is private and made anew each time, so an interrupted assembly leaves nothing behind that matters, and equal
units give equal files. Weights stay in the work store and are published from there one file at a time: no disk has to
hold all of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.calibrate.tokens import overlap
from pipeline.facts import (
    FACTS_FILE,
    UNQUANTIZED_BITS,
    CalibrationFacts,
    ModuleFacts,
    Quality,
    ReleaseFacts,
    SiblingFacts,
    SourceFacts,
    Verdict,
    weights_by_width,
)
from pipeline.fingerprint import fingerprint
from pipeline.graph.build import Inputs, JobUnits, VariantPlan, VariantUnits
from pipeline.graph.dag import WorkUnit
from pipeline.graph.expert_facts import expert_cautions, expert_degradations, scaling_cautions
from pipeline.graph.identity import COMPUTE_PACKAGES
from pipeline.graph.stages.call import OUTPUT
from pipeline.graph.stopping import Stopping
from pipeline.hub.card import read_card
from pipeline.hub.fetch import FetchedSource
from pipeline.publish.card import render_card
from pipeline.publish.plots import plot_layer_error, plot_size_quality
from pipeline.publish.report import facts_as_json
from pipeline.skeleton.experts import find_routers
from pipeline.spec import PER_CHANNEL, CalibrationSpec, ExpertStatistics, VariantSpec, resolve_budgets
from pipeline.storage.release import StoredFile
from pipeline.storage.work import StageRecord, WorkStore
from pipeline.tensors.writer import write_index
from pipeline.validate.divergence import Divergence, add_up
from pipeline.validate.gates import (
    check_accounting,
    check_degradations,
    check_divergence,
    check_generation,
    check_relative_error,
    check_round_trip,
    check_scales,
    make_verdict,
)
from pipeline.validate.generation import Continuation

Records = Mapping[str, StageRecord]
"""Finished units' records by key."""


@dataclass(frozen=True)
class Measured:
    """What is known of one variant before its siblings are.

    Attributes:
        plan: The variant.
        modules: Every linear.
        kept: Tensors copied, with reasons.
        quality: Against the source.
        verdict: All gates.
        size_bytes: Bytes of weights.
    """

    plan: VariantPlan
    modules: tuple[ModuleFacts, ...]
    kept: dict[str, str]
    quality: Quality
    verdict: Verdict
    size_bytes: int


def measure_variant(inputs: Inputs, plan: VariantPlan, units: JobUnits, records: Records) -> Measured:
    """Return figures and Verdict of one variant, from its units' records."""
    own = units.variants[plan.spec.name]
    modules = _modules(plan, own, records, inputs.spec.calibration)
    kept = _kept(inputs, plan, own, units, records)
    quality = _quality(inputs, own, records)
    budgets = resolve_budgets(inputs.spec.gates, plan.spec, weights_by_width(modules))
    packs = [records[unit.key].summary for unit in own.packs]
    prompts = inputs.spec.gates.prompts
    source, variant = (_continuations(unit, records) for unit in (units.source_generation, own.generation))
    quantized = [module.name for module in modules if module.group_size]
    weights = {name + ".weight" for name in quantized}
    written = [*packs, records[units.outer.key].summary]
    problems = [problem for summary in written for problem in summary["problems"]]
    checks = (
        check_accounting(inputs.outline.index.entries, weights, kept, {}),
        check_round_trip(sum(pack["num_proven"] for pack in packs), len(quantized), problems),
        check_scales([problem for pack in packs for problem in pack["scale_problems"]], len(quantized)),
        check_relative_error(modules, budgets.max_relative_error),
        check_degradations(modules, budgets.max_degradations),
        check_divergence(quality, budgets),
        check_generation(prompts, source, variant),
    )
    size = sum(summary["bytes"] for summary in written)
    return Measured(plan, modules, kept, quality, make_verdict(checks, budgets, prompts, variant), size)


def _modules(
    plan: VariantPlan, own: VariantUnits, records: Records, calibration: CalibrationSpec
) -> tuple[ModuleFacts, ...]:
    reports: dict[str, dict[str, Any]] = {}
    for unit in own.packs:
        reports |= records[unit.key].summary["reports"]
    return tuple(_module(plan, name, reports.get(name), calibration) for name in plan.matrices)


def _module(
    plan: VariantPlan, name: str, report: Mapping[str, Any] | None, calibration: CalibrationSpec
) -> ModuleFacts:
    matrix = plan.matrices[name]
    scheme, linear = matrix.scheme, matrix.linear
    size = 0 if scheme is None else PER_CHANNEL if plan.spec.group_size == PER_CHANNEL else scheme.group_size
    report = report or {}
    tokens = report.get("expert_tokens")
    return ModuleFacts(
        name=name,
        block=matrix.block,
        out_features=linear.out_features,
        in_features=linear.in_features,
        bits=UNQUANTIZED_BITS if scheme is None else scheme.bits,
        group_size=size,
        note=matrix.note,
        loss=report.get("loss", 0.0),
        relative_error=report.get("relative_error", 0.0),
        weight_error=report.get("weight_error", 0.0),
        damping=report.get("damping", 0.0),
        shrinkage=report.get("shrinkage", 0.0),
        awq_exponent=report.get("awq_exponent"),
        refinement_rounds=report.get("num_rounds", 0),
        clip=report.get("clip"),
        tokens=report.get("num_tokens"),
        dead_inputs=report.get("num_dead_inputs"),
        degradations=(*report.get("degradations", ()), *expert_degradations(tokens, calibration)),
        expert_tokens=tokens,
        predicted_kl=plan.predicted_kl_of(name),
    )


def _kept(inputs: Inputs, plan: VariantPlan, own: VariantUnits, units: JobUnits, records: Records) -> dict[str, str]:
    """Return the source tensors that the written files hold under their own names, with the reason."""
    reasons = {}
    outer = {name: model for model, name in inputs.outline.skeleton.outer_tensors().items()}
    for name in records[units.outer.key].summary["tensors"]:
        unused = "not used by the language model; copied as it is"
        reasons[name] = _outer_reason(inputs, outer[name]) if name in outer else unused
    for unit in own.packs:
        summary = records[unit.key].summary
        present = set(summary["tensors"]) & set(inputs.outline.index.entries)
        folded = set(summary["folded"])
        routers = _router_tensors(inputs, unit.block)
        for name in sorted(present):
            linear = plan.matrices.get(name.removesuffix(".weight"))
            if linear is not None and linear.scheme is not None and name.endswith(".weight"):
                continue  # codes, which lie under the name of the weight
            if name in routers:
                scaled = ", follows activation-aware scales" if name in folded else ""
                reasons[name] = f"router of experts{scaled}"
            elif name in folded:
                reasons[name] = "takes up activation-aware scales"
            elif linear is not None and name.endswith(".weight"):
                reasons[name] = linear.note
            else:
                reasons[name] = "bias" if name.endswith(".bias") else "norm or other parameter of a block"
    return reasons


def _router_tensors(inputs: Inputs, block: int) -> set[str]:
    """Return the tensors of a block's routers."""
    skeleton = inputs.outline.skeleton
    prefixes = tuple(f"{router}." for router in find_routers(skeleton.block(block)))
    return {name for local, name in skeleton.block_tensors(block).items() if local.startswith(prefixes)}


def _outer_reason(inputs: Inputs, model_name: str) -> str:
    net = inputs.outline.skeleton.net
    module = net.get_submodule(model_name.rpartition(".")[0])
    if module is net.get_output_embeddings():
        return "output head"
    return "embedding" if module is net.get_input_embeddings() else "outside the decoder blocks"


def _quality(inputs: Inputs, own: VariantUnits, records: Records) -> Quality:
    total = add_up(Divergence(**records[unit.key].summary["divergence"]) for unit in own.scores)
    return Quality(
        heldout_text=inputs.heldout.provenance,
        heldout_samples=inputs.heldout.tokens_NL.shape[0],
        heldout_length=inputs.heldout.tokens_NL.shape[1],
        heldout_tokens=total.num_tokens,
        heldout_overlap=overlap(inputs.calibration, inputs.heldout),
        source_perplexity=total.source_perplexity,
        perplexity=total.perplexity,
        kl=total.mean_kl,
        top1_agreement=total.top1_agreement,
    )


def _continuations(unit: WorkUnit, records: Records) -> list[Continuation]:
    return [Continuation(tuple(item["ids"]), item["text"]) for item in records[unit.key].summary["continuations"]]


def weights_fingerprint(fetched: FetchedSource, variant: VariantSpec, units: JobUnits) -> str:
    """Return the fingerprint of a source, a variant, and everything that its weights are computed from and by."""
    packs = units.variants[variant.name].packs
    weights = [unit.key for unit in (units.outer, *packs)]
    return fingerprint({"source": fetched.commit, "variant": variant, "weights": weights})


def make_facts(
    inputs: Inputs,
    fetched: FetchedSource,
    release: str,
    own: Measured,
    all_: Sequence[Measured],
    units: JobUnits,
    known: Sequence[SiblingFacts] = (),
) -> ReleaseFacts:
    """Return everything that a release says about itself.

    Args:
        inputs: What the conversion depends on.
        fetched: The source.
        release: ``namespace/name``.
        own: The variant.
        all_: All variants of this run.
        units: Of this run.
        known: Siblings that the same weights were published with before; those of this run take their place.
    """
    siblings = {item.variant: item for item in known} | {
        other.plan.spec.name: SiblingFacts(
            variant=other.plan.spec.name,
            passed=other.verdict.passed,
            size_bytes=other.size_bytes,
            kl=other.quality.kl,
            perplexity=other.quality.perplexity,
        )
        for other in all_
        if other is not own
    }
    calibration = inputs.spec.calibration
    versions = {"bitmill": version("bitmill"), **{name: version(name) for name in COMPUTE_PACKAGES}}
    return ReleaseFacts(
        release=release,
        variant=own.plan.spec,
        source=_source_facts(inputs, fetched),
        calibration=CalibrationFacts(
            text=inputs.calibration.provenance,
            samples=calibration.samples,
            length=calibration.length,
            seed=calibration.seed,
            slice_sequences=calibration.slice_sequences,
            shrinkage=calibration.shrinkage,
            tokens_digest=inputs.calibration.digest,
            precision=inputs.spec.precision,
            **_expert_calibration(own, calibration),
        ),
        modules=own.modules,
        kept=own.kept,
        dropped={},
        cautions=(
            *own.plan.cautions(calibration),
            *expert_cautions(own.modules, calibration),
            *scaling_cautions(own.modules, own.plan.spec),
        ),
        quality=own.quality,
        verdict=own.verdict,
        generated_tokens=inputs.spec.gates.generated_tokens,
        size_bytes=own.size_bytes,
        siblings=tuple(siblings[name] for name in sorted(siblings)),
        versions=versions,
        compute=f"{inputs.device} float32",
        spec_fingerprint=weights_fingerprint(fetched, own.plan.spec, units),
    )


def _expert_calibration(own: Measured, calibration: CalibrationSpec) -> dict[str, Any]:
    """Return what is said of the calibration of a model that has experts."""
    if not any(matrix.linear.expert for matrix in own.plan.matrices.values()):
        return {}
    is_blended = calibration.experts is ExpertStatistics.SHRINKAGE
    return {
        "experts": calibration.experts,
        "expert_shrinkage": calibration.expert_shrinkage if is_blended else None,
        "min_expert_tokens": None if calibration.experts is ExpertStatistics.ALL else calibration.min_expert_tokens,
    }


def _source_facts(inputs: Inputs, fetched: FetchedSource) -> SourceFacts:
    index = inputs.outline.index
    bytes_by_dtype: dict[str, int] = {}
    for _, entry in index.entries.values():
        bytes_by_dtype[entry.dtype] = bytes_by_dtype.get(entry.dtype, 0) + entry.num_bytes
    most = max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    card = read_card(fetched.folder)
    return SourceFacts(
        name=fetched.source.name,
        is_local=fetched.source.is_local,
        commit=fetched.commit,
        license=card.license,
        base_models=() if fetched.source.is_on_hub else card.base_models,
        architecture=inputs.outline.skeleton.architecture,
        num_parameters=index.num_parameters,
        size_bytes=index.total_bytes,
        dtype=names.get(most, most.lower()),
        file_digests={path: digest for path, digest in sorted(fetched.digests.items()) if path in index.files},
    )


@dataclass(frozen=True)
class Assembled:
    """The files of a release by name.

    Attributes:
        written: Those in its folder.
        stored: The weights, which stay in the work store until each is published.
    """

    written: frozenset[str]
    stored: Mapping[str, StoredFile]


def assemble_release(
    inputs: Inputs,
    fetched: FetchedSource,
    facts: ReleaseFacts,
    units: JobUnits,
    records: Records,
    work: WorkStore,
    folder: Path,
    stopping: Stopping,
) -> Assembled:
    """Make an empty folder the release but for its weights: index, config, companions, facts, card, plots.

    Raises:
        GraphError: with the code ``graph.cancelled`` when the job is; also while weights are published.
    """
    model = write_model(inputs, fetched, facts.variant, units, records, work, folder, facts.size_bytes, stopping)
    (folder / FACTS_FILE).write_text(facts_as_json(facts), encoding="utf-8")
    (folder / "README.md").write_text(render_card(facts), encoding="utf-8")
    (folder / "layer_error.png").write_bytes(plot_layer_error(facts))
    (folder / "size_quality.png").write_bytes(plot_size_quality(facts))
    told = {FACTS_FILE, "README.md", "layer_error.png", "size_quality.png"}
    return replace(model, written=model.written | told)


def write_model(
    inputs: Inputs,
    fetched: FetchedSource,
    variant: VariantSpec,
    units: JobUnits,
    records: Records,
    work: WorkStore,
    folder: Path,
    size_bytes: int,
    stopping: Stopping,
) -> Assembled:
    """Make an empty folder what engines load but for the weights: index, config, companions.

    Raises:
        GraphError: with the code ``graph.cancelled`` when the job is, while weights are put in their places.
    """
    sources = (units.outer, *units.variants[variant.name].packs)
    weight_map: dict[str, str] = {}
    stored: dict[str, StoredFile] = {}
    written = {"model.safetensors.index.json", "config.json"}
    for number, unit in enumerate(sources, 1):
        name = f"model-{number:05d}-of-{len(sources):05d}.safetensors"
        record = records[unit.key]
        file = record.files[OUTPUT]
        stored[name] = StoredFile(file.size_bytes, file.sha256, partial(_place, work, unit, stopping))
        weight_map.update(dict.fromkeys(record.summary["tensors"], name))
    write_index(folder / "model.safetensors.index.json", weight_map, size_bytes)
    config = next(plan.quantization_config for plan in inputs.variants if plan.spec.name == variant.name)
    _write_json(folder / "config.json", {**inputs.outline.config, "quantization_config": config})
    for path in sorted(fetched.digests):
        if _is_companion(path, inputs):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched.folder / path, folder / path)
            written.add(path)
    return Assembled(frozenset(written), stored)


def _place(work: WorkStore, unit: WorkUnit, stopping: Stopping, target: Path) -> None:
    """Put a unit's file at a path, its digest checked; a file of the work store may be gone from this machine later."""
    stopping.check()
    _link(work.open_checked(*unit.place, OUTPUT), target)


def _is_companion(path: str, inputs: Inputs) -> bool:
    replaced = {"config.json", "README.md", "model.safetensors.index.json", "quantize_config.json"}
    return path not in replaced and path not in inputs.outline.index.files


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links: a copy is as good
        shutil.copyfile(source, target)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
