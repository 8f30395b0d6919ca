"""A release in another checkpoint format: the same codes, scales and zero points, laid out otherwise.

Nothing is solved again, so a repacked release computes exactly what the one that it is made from does, as far as
engines compute both alike; the figures that were measured of that stay true. What is proven anew is what is new: every
linear reads back from its new file as exactly the codes and grids that the old one holds, everything else is copied bit
for bit, and the project's own loader chooses the recorded tokens from the new folder. A release that holds what the
other format cannot (zero points, widths, several grids, sizes) is refused before anything is written.

One file of weights is in memory at a time, in both formats.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.errors import CorruptReleaseError, PlanError
from pipeline.facts import FACTS_FILE, Check, ModuleFacts, ReleaseFacts, SiblingFacts
from pipeline.fingerprint import fingerprint
from pipeline.formats.codec import codec_for, prove_round_trip
from pipeline.formats.config import quantization_config
from pipeline.graph.build import schemes_by_every_name
from pipeline.graph.outline import Outline
from pipeline.publish.card import render_card
from pipeline.publish.plots import plot_layer_error, plot_size_quality
from pipeline.publish.report import facts_as_json
from pipeline.quantize.types import QuantizedLinear, Scheme, SolveReport
from pipeline.settings import Settings
from pipeline.spec import Format, VariantSpec
from pipeline.storage.locate import LocatedRelease, copy_release, locate_release, verify_release_files
from pipeline.storage.manifest import MANIFEST_NAME
from pipeline.storage.objects import ObjectStore
from pipeline.storage.release import publish_release
from pipeline.storage.temporaries import private_folder
from pipeline.strict import problems as spec_problems
from pipeline.strict_json import parse_json_object
from pipeline.tensors.local import copy_problems, read_file_index, read_file_tensors
from pipeline.tensors.writer import write_index, write_safetensors
from pipeline.validate.gates import check_round_trip
from pipeline.validate.release import ReleaseModel, check_release, read_facts

TOLD = (FACTS_FILE, "README.md", "layer_error.png", "size_quality.png")
"""Files that say something of a release, which are made anew."""

INDEX_FILE, CONFIG_FILE = "model.safetensors.index.json", "config.json"


@dataclass(frozen=True)
class Repacked:
    """A release in its new format.

    Attributes:
        facts: Everything known of it.
        locations: Where it was published, one for each target.
    """

    facts: ReleaseFacts
    locations: tuple[str, ...]


def repack(
    location: str,
    format_: Format,
    stores: Sequence[ObjectStore],
    release: str,
    settings: Settings,
    on_line: Callable[[str], None],
) -> Repacked:
    """Publish a release in another format.

    Idempotent: the same release and format give the same bytes, and what is published already is not written again.

    Args:
        location: The release, as ``locate_release`` takes it.
        format_: The format.
        stores: Where to.
        release: ``namespace/name`` of the new one; made from the old one's when empty.
        settings: Where things are.
        on_line: Told what takes long.

    Raises:
        PlanError: when the format cannot hold what the release does, or it is in that format.
        CorruptReleaseError: when the release is damaged, or what was written is not what it should be.
        StorageError: when it cannot be found, or not be published.
    """
    located = locate_release(location, settings)
    with ExitStack() as stack:
        folder = _at_hand(located, settings, stack)
        facts = read_facts(folder)
        variant = variant_in(facts.variant, format_)
        out = stack.enter_context(private_folder(settings.cache_dir / "repack"))
        address = release or _renamed(facts, variant)
        made = _write(located, folder, facts, variant, address, out, on_line)
        namespace, _, name = address.partition("/")
        provenance = {
            "repacked_from": made.repacked_from,
            "source": made.source.name,
            "commit": made.source.commit,
            "variant": made.variant.model_dump(mode="json"),
            "spec_fingerprint": made.spec_fingerprint,
            "versions": made.versions,
        }
        files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        locations = []
        for store in stores:
            on_line(f"publishing {address} to {store.url}")
            done = publish_release(store, out, namespace, name, provenance, file_names=files, verdict_passed=True)
            locations.append(done.path_or_uri)
    return Repacked(made, tuple(locations))


def variant_in(variant: VariantSpec, format_: Format) -> VariantSpec:
    """Return a variant as it is called in another format.

    Raises:
        PlanError: when it is in that format, or this cannot hold it.
    """
    if variant.format is format_:
        raise PlanError(
            f"variant {variant.name} is in format {format_} already",
            code="plan.repack",
            hint="bitmill download makes a copy of a release as it is",
        )
    keys = variant.model_dump(mode="json") | {"format": format_.value, "name": ""}
    try:
        return VariantSpec.model_validate(keys)
    except ValidationError as error:
        raise PlanError(
            f"variant {variant.name} cannot be repacked: {'; '.join(spec_problems(error, VariantSpec))}",
            code="plan.repack",
            hint="convert the source to that format anew",
        ) from error


def _at_hand(located: LocatedRelease, settings: Settings, stack: ExitStack) -> Path:
    """Return a folder with the release's files, compared with the manifest.

    Raises:
        CorruptReleaseError: when one is not what it says.
    """
    if located.local_path is not None:
        folder, problems = located.local_path, verify_release_files(located)
    else:
        folder = stack.enter_context(private_folder(settings.cache_dir / "verify"))
        problems = copy_release(located, folder)
    if problems:
        raise CorruptReleaseError(
            f"{located.uri} is damaged: {'; '.join(problems[:3])}", hint="publish it again from its source"
        )
    return folder


def _renamed(facts: ReleaseFacts, variant: VariantSpec) -> str:
    """Return the release's address with the new variant's name at its end."""
    stem = facts.release.removesuffix(f"-{facts.variant.name}")
    return f"{stem}-{variant.name}"


def _write(
    located: LocatedRelease,
    folder: Path,
    facts: ReleaseFacts,
    variant: VariantSpec,
    address: str,
    out: Path,
    on_line: Callable[[str], None],
) -> ReleaseFacts:
    """Make ``out`` the release in its new format, and return what it says of itself."""
    out.mkdir()
    model = ReleaseModel(folder)
    schemes = model.schemes()
    codec = codec_for(variant.format)
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in model.linears()}
    for name, scheme in schemes.items():
        if scheme is not None and (reason := codec.check(name, *sizes[name], scheme)):
            raise PlanError(f"{located.uri} cannot be repacked: {reason}", code="plan.repack")
    config = parse_json_object((folder / CONFIG_FILE).read_bytes())
    outline = Outline(config, model.index, model.skeleton, model.groups)
    named = schemes_by_every_name(outline, schemes)
    config["quantization_config"] = quantization_config(variant.format, named, variant, version("bitmill"))
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    reports = {module.name: _report(module) for module in facts.modules}
    dtype = torch.float16 if facts.source.dtype == "float16" else torch.bfloat16
    weight_map: dict[str, str] = {}
    size_bytes, found, num_proven = 0, list[str](), 0
    for path in sorted(folder.glob("*.safetensors")):
        on_line(f"{path.name}: {facts.variant.format} to {variant.format}")
        wrong, proven = _repack_file(
            path, out / path.name, facts.variant.format, variant.format, quantized, reports, dtype
        )
        index = read_file_index(out / path.name)
        weight_map |= dict.fromkeys(index.entries, path.name)
        size_bytes, num_proven = size_bytes + index.total_bytes, num_proven + proven
        found += wrong
    write_index(out / INDEX_FILE, weight_map, size_bytes)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in _companions(folder):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, out / path)
    round_trip = check_round_trip(num_proven, len(quantized), found)
    made = _facts(located, facts, variant, address, size_bytes, round_trip)
    on_line("checking what was written")
    failed = [check for check in (round_trip, *check_release(out, made, made.generated_tokens)) if not check.passed]
    if failed:
        said = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise CorruptReleaseError(f"{located.uri} did not survive repacking: {said}")
    (out / FACTS_FILE).write_text(facts_as_json(made), encoding="utf-8")
    (out / "README.md").write_text(render_card(made), encoding="utf-8")
    (out / "layer_error.png").write_bytes(plot_layer_error(made))
    (out / "size_quality.png").write_bytes(plot_size_quality(made))
    return made


def _repack_file(
    path: Path,
    target: Path,
    before: Format,
    after: Format,
    quantized: Mapping[str, Scheme],
    reports: Mapping[str, SolveReport],
    dtype: torch.dtype,
) -> tuple[list[str], int]:
    """Write one file of weights in the new format, and return what is wrong with it, and how many linears were proven.

    Raises:
        FormatError: when a linear cannot be read, or comes back different.
    """
    old, new = codec_for(before), codec_for(after)
    tensors = read_file_tensors(path)
    linears: dict[str, QuantizedLinear] = {}
    for name, scheme in quantized.items():
        own = [f"{name}.{suffix}" for suffix in old.suffixes(scheme)]
        if not any(stored in tensors for stored in own):
            continue
        linears[name] = QuantizedLinear(scheme, *old.unpack(name, tensors, scheme), reports[name])
        for stored in own:
            del tensors[stored]
    packed = {k: t for name, linear in linears.items() for k, t in new.pack(name, linear, dtype).items()}
    write_safetensors(target, tensors | packed, {})
    back = read_file_tensors(target)
    for name, linear in linears.items():
        prove_round_trip(new, name, linear, back)
    return copy_problems(target, tensors), len(linears)


def _report(module: ModuleFacts) -> SolveReport:
    """Return what is known of a linear's solve."""
    return SolveReport(
        loss=module.loss,
        relative_error=module.relative_error,
        weight_error=module.weight_error,
        damping=module.damping,
        shrinkage=module.shrinkage,
        clip=module.clip or 0.0,
        num_tokens=module.tokens or 0,
        num_dead_inputs=module.dead_inputs or 0,
        num_rounds=module.refinement_rounds,
        degradations=module.degradations,
    )


def _companions(folder: Path) -> Iterator[Path]:
    """Yield the files, relative to the folder, that are the same in every format."""
    made = {*TOLD, INDEX_FILE, CONFIG_FILE, MANIFEST_NAME}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.as_posix() not in made and path.suffix != ".safetensors":
            yield relative


def _facts(
    located: LocatedRelease,
    facts: ReleaseFacts,
    variant: VariantSpec,
    address: str,
    size_bytes: int,
    round_trip: Check,
) -> ReleaseFacts:
    """Return what the release says of itself in its new format. Engines were asked about the old one, so their answers
    are left out."""
    checks = tuple(
        round_trip if check.name == round_trip.name else check for check in facts.verdict.checks if not check.engine
    )
    original = SiblingFacts(
        variant=facts.variant.name,
        passed=True,
        size_bytes=facts.size_bytes,
        kl=facts.quality.kl,
        perplexity=facts.quality.perplexity,
    )
    siblings: dict[str, Any] = {item.variant: item for item in (*facts.siblings, original)}
    siblings.pop(variant.name, None)
    return facts.model_copy(
        update={
            "release": address,
            "variant": variant,
            "verdict": facts.verdict.model_copy(update={"checks": checks}),
            "size_bytes": size_bytes,
            "siblings": tuple(siblings[name] for name in sorted(siblings)),
            "spec_fingerprint": fingerprint({"repacked": facts.spec_fingerprint, "variant": variant}),
            "repacked_from": f"{facts.release}@{located.revision}",
        }
    )
