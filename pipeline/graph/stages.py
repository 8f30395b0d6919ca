"""The functions that workers run: plain functions from files of the work store (and the source) to files of it.

Each writes its outputs through a ``StageWriter``: files first, record last, then one rename. A unit that is killed
leaves a temporary folder that nobody reads; a unit that runs twice writes the same bytes. Nothing durable lives in
memory or inside Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.calibrate.forward import forward_block
from pipeline.formats.codec import codec_for, prove_round_trip
from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.folds import ScaleResult, fold_block, search_group_scales
from pipeline.graph.outline import Source, open_folder
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.statistics import from_tensors, merge, rescale, to_tensors
from pipeline.quantize.types import QuantizedLinear, Scheme, SolveReport, Statistics
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.model import Skeleton
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.spec import Format, Method
from pipeline.storage.work import StageRecord, StageWriter, WorkStore
from pipeline.tensors.local import read_file_tensors
from pipeline.tensors.writer import write_safetensors
from pipeline.validate.dense import DenseReader, scale_problems
from pipeline.validate.divergence import Divergence, add_up, compare_logits
from pipeline.validate.generation import BlockCache, continue_greedily

ALGORITHM_VERSIONS: dict[Kind, int] = dict.fromkeys(Kind, 1)
"""Part of every key: raised when a stage's code changes its output, so that stale outputs are not found."""

THREADS_PER_UNIT = 1
"""Threads of one work unit. More would change the order of summation inside BLAS, hence the bytes."""


@dataclass(frozen=True)
class JobContext:
    """What every work unit of a job needs to know; no part of any key.

    Attributes:
        work_root: Folder of the work store, reachable by every worker.
        source_folder: Folder with the source's files.
        device: ``cpu`` or ``cuda``.
    """

    work_root: str
    source_folder: str
    device: str


@lru_cache(maxsize=2)
def open_source(folder: str, device: str) -> Source:
    """Return the source in ``folder``; headers and config are read once per process."""
    return open_folder(Path(folder), device)


@lru_cache(maxsize=2)
def _open_work(root: str) -> WorkStore:
    """Return this process's view of the work store, which remembers the digests that it has checked."""
    return WorkStore(Path(root))


def run_unit(context: JobContext, unit: WorkUnit) -> StageRecord:
    """Run one work unit and return its record; a finished one is not run again.

    Raises:
        PipelineError: as the stage raised it.
    """
    torch.set_num_threads(THREADS_PER_UNIT)
    work = _open_work(context.work_root)
    known = work.lookup(unit.kind.value, unit.key)
    if known is not None:
        return known
    call = Call(context, unit, work, open_source(context.source_folder, context.device))
    with work.writing(unit.kind.value, unit.key) as writer:
        return writer.finish(STAGES[unit.kind](call, writer))


@dataclass(frozen=True)
class Call:
    """One run of a stage function."""

    context: JobContext
    unit: WorkUnit
    work: WorkStore
    source: Source

    @property
    def params(self) -> dict[str, Any]:
        """The unit's arguments."""
        return self.unit.params

    @property
    def skeleton(self) -> Skeleton:
        """The source's skeleton."""
        return self.source.outline.skeleton

    @property
    def group(self) -> LinearGroup:
        """The linear group that the unit works on."""
        position: int = self.params["group"]
        return self.source.outline.groups[self.unit.block][position]

    def needs(self, kind: Kind) -> list[WorkUnit]:
        """Return the units of one kind that this one reads, in order."""
        return [need for need in self.unit.needs if need.kind is kind]

    def load(self, need: WorkUnit, file: str) -> dict[str, Tensor]:
        """Return the tensors of a file of another unit's output, its digest checked."""
        path = self.work.open_checked(need.kind.value, need.key, file)
        return {name: tensor.to(self.context.device) for name, tensor in read_file_tensors(path).items()}

    def summary(self, need: WorkUnit) -> dict[str, Any]:
        """Return another unit's summary."""
        record = self.work.lookup(need.kind.value, need.key)
        if record is None:
            raise FileNotFoundError(f"{need.kind} {need.key} is not in the work store")
        return record.summary


def _save(writer: StageWriter, file: str, tensors: Mapping[str, Tensor]) -> None:
    write_safetensors(writer.path(file), {name: tensor.cpu() for name, tensor in tensors.items()}, {})


def _tokens(call: Call) -> Tensor:
    return torch.tensor(call.params["tokens"], dtype=torch.int64, device=call.context.device)


def embed(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write the hidden states that enter block 0 for one token slice."""
    skeleton = call.skeleton
    tokens_NL = _tokens(call)
    skeleton.attach_outer(call.source.outer())
    hidden = torch.cat([skeleton.embed(row[None]) for row in tokens_NL])
    skeleton.detach_outer()
    _save(writer, "hidden.safetensors", {"hidden": hidden})
    return {}


def calibrate(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write one block's output hidden states for one token slice and, if asked, its input statistics."""
    (before,) = call.unit.needs
    skeleton, index = call.skeleton, call.unit.block
    hidden = call.load(before, "hidden.safetensors")["hidden"]
    groups = call.source.outline.groups[index] if call.params["collect"] else ()
    with skeleton.attached(index, call.source.block(index)):
        output, statistics = forward_block(skeleton, index, hidden, groups)
    _save(writer, "hidden.safetensors", {"hidden": output})
    if call.params["collect"]:
        _save(writer, "statistics.safetensors", _pack_statistics(statistics))
    return {}


def merge_slices(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write the statistics of all linear groups of one block: the slices' sums, added in the slices' order."""
    parts = [_unpack_statistics(call.load(need, "statistics.safetensors")) for need in call.unit.needs]
    merged = [merge([part[group] for part in parts]) for group in range(len(parts[0]))]
    _save(writer, "statistics.safetensors", _pack_statistics(merged))
    return {"tokens": merged[0].num_tokens}


def _pack_statistics(statistics: Sequence[Statistics]) -> dict[str, Tensor]:
    return {
        f"{position}.{name}": tensor
        for position, item in enumerate(statistics)
        for name, tensor in to_tensors(item).items()
    }


def _unpack_statistics(tensors: Mapping[str, Tensor]) -> list[Statistics]:
    count = 1 + max(int(name.partition(".")[0]) for name in tensors)
    return [
        from_tensors({n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{position}.")})
        for position in range(count)
    ]


def _statistics(call: Call, group: int) -> Statistics:
    (merged,) = call.needs(Kind.MERGE)
    return _unpack_statistics(call.load(merged, "statistics.safetensors"))[group]


def _scheme(call: Call) -> Scheme:
    return Scheme(**call.params["scheme"])


def _options(call: Call) -> SolveOptions:
    return SolveOptions(**call.params["options"])


def scales(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write the activation-aware scale of one linear group and the layer that takes up its inverse."""
    skeleton, index = call.skeleton, call.unit.block
    weights = call.source.block(index)
    with skeleton.attached(index, weights):
        result = search_group_scales(
            skeleton, call.group, weights, _statistics(call, call.params["group"]), _scheme(call), _options(call)
        )
    _save(writer, "scales.safetensors", result.tensors)
    return result.summary


def solve_group(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write codes, scales and zero points of one linear group's members, solved as rows of one matrix."""
    group, position = call.group, call.params["group"]
    found = _scale_results(call)
    device = call.context.device
    weights = {name: tensor.to(device) for name, tensor in call.source.block(call.unit.block).items()}
    folded = fold_block(weights, found.values())
    matrices = [linear.to_rows(folded[linear.local_name + ".weight"]).float() for linear in group.linears]
    stack_OI, statistics = torch.cat(matrices), _statistics(call, position)
    if position in found:
        stack_OI = stack_OI * found[position].scale_I
        statistics = rescale(statistics, found[position].scale_I)
    sizes = [matrix.shape[0] for matrix in matrices]
    solved = solve(Method(call.params["method"]), stack_OI, sizes, statistics, _scheme(call), _options(call))
    tensors = {}
    for linear, result in zip(group.linears, solved, strict=True):
        tensors[f"{linear.name}.codes"] = result.codes_OI
        tensors[f"{linear.name}.scale"] = result.scale_OG
        tensors[f"{linear.name}.zero"] = result.zero_OG
    _save(writer, "codes.safetensors", tensors)
    reports = {linear.name: asdict(item.report) for linear, item in zip(group.linears, solved, strict=True)}
    exponent = found[position].exponent if position in found else None
    return {"reports": reports, "awq_exponent": exponent, "loss": sum(r["loss"] for r in reports.values())}


def _scale_results(call: Call) -> dict[int, ScaleResult]:
    """Return the scales of the block's groups that have some, by group position."""
    results = {}
    for need in call.needs(Kind.SCALES):
        result = ScaleResult.load(call.load(need, "scales.safetensors"), call.summary(need))
        if result.producer is not None:
            results[need.params["group"]] = result
    return results


def pack(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write one block's tensors in the variant's format, read them back and prove them equal to the codes."""
    format_, index = Format(call.params["format"]), call.unit.block
    codec = codec_for(format_)
    names = call.skeleton.block_tensors(index)
    weights = call.source.block(index)
    scale_dtype = _scale_dtype(weights)
    folded = fold_block(weights, _scale_results(call).values())
    quantized = _solved_linears(call)
    kept = {name: local for local, name in names.items() if name.removesuffix(".weight") not in quantized}
    tensors = {name: folded[local].to(weights[local].dtype) for name, local in kept.items()}
    for name, linear in quantized.items():
        tensors.update(codec.pack(name, linear, scale_dtype))
    _save(writer, "block.safetensors", tensors)
    back = read_file_tensors(writer.path("block.safetensors"))
    problems = []
    for name, linear in quantized.items():
        prove_round_trip(codec, name, linear, back)
        _, scale_OG, _ = codec.unpack(name, back, linear.scheme)
        problems.extend(scale_problems(name, scale_OG))
    return {
        "tensors": sorted(back),
        "num_proven": len(quantized),
        "scale_problems": problems,
        "bytes": sum(tensor.nbytes for tensor in back.values()),
        "folded": sorted(name for name, local in kept.items() if folded[local] is not weights[local]),
    }


def _scale_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that compressed-tensors scales are stored in: the source's own 16-bit dtype."""
    kinds = {tensor.dtype for tensor in weights.values()}
    return torch.bfloat16 if torch.bfloat16 in kinds else torch.float16


def _solved_linears(call: Call) -> dict[str, QuantizedLinear]:
    quantized: dict[str, QuantizedLinear] = {}
    for need in call.needs(Kind.SOLVE):
        tensors, summary = call.load(need, "codes.safetensors"), call.summary(need)
        scheme = Scheme(**need.params["scheme"])
        for name, report in summary["reports"].items():
            quantized[name] = QuantizedLinear(
                scheme=scheme,
                codes_OI=tensors[f"{name}.codes"].cpu(),
                scale_OG=tensors[f"{name}.scale"].cpu(),
                zero_OG=tensors[f"{name}.zero"].cpu(),
                report=SolveReport(**{**report, "degradations": tuple(report["degradations"])}),
            )
    return quantized


def outer(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Write everything outside the blocks as it is in the source: embeddings, final norm, output head, extras."""
    skeleton = call.skeleton
    names = [*skeleton.outer_tensors().values(), *skeleton.extra_names]
    tensors = call.source.read({name: name for name in dict.fromkeys(names)})
    _save(writer, "outer.safetensors", tensors)
    return {"tensors": sorted(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}


class VariantReader:
    """Dense weights of one variant from its packed blocks, or of the source when there are none."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._packs = {need.block: need for need in call.needs(Kind.PACK)}
        linears = [linear for block in call.source.outline.groups for group in block for linear in group.linears]
        self._reader = DenseReader(call.params["quantization_config"], linears)

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return the dense weights of one block by local name."""
        names = self._call.skeleton.block_tensors(index)
        if index not in self._packs:
            return self._call.source.block(index)
        return self._reader.dense(names, self._call.load(self._packs[index], "block.safetensors"))


def evaluate(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Compare the variant's predictions with the source's over one slice of held-out tokens."""
    skeleton, tokens_NL = call.skeleton, _tokens(call)
    (final,) = call.needs(Kind.CALIBRATE)
    source_NLH = call.load(final, "hidden.safetensors")["hidden"]
    load = VariantReader(call)
    skeleton.attach_outer(call.source.outer())
    hidden = torch.cat([skeleton.embed(row[None]) for row in tokens_NL])
    for index in range(skeleton.num_blocks):
        with skeleton.attached(index, load(index)):
            hidden, _ = forward_block(skeleton, index, hidden, ())
    parts: list[Divergence] = []
    for row in range(tokens_NL.shape[0]):
        source_LV = skeleton.logits(source_NLH[row : row + 1])[0]
        parts.append(compare_logits(source_LV, skeleton.logits(hidden[row : row + 1])[0], tokens_NL[row]))
    skeleton.detach_outer()
    return {"divergence": add_up(parts).as_dict()}


def generate(call: Call, writer: StageWriter) -> dict[str, Any]:
    """Continue the smoke prompts greedily with the variant's dense weights, or the source's."""
    source = call.source
    tokenizer = TextTokenizer(source.folder)
    load = BlockCache(VariantReader(call))
    call.skeleton.attach_outer(source.outer())
    found = []
    for prompt in call.params["prompts"]:
        prompt_ids = tokenizer.encode(prompt, with_special=True)
        ids = continue_greedily(call.skeleton, load, prompt_ids, call.params["max_tokens"], tokenizer.end_ids)
        found.append({"ids": list(ids), "text": tokenizer.decode(list(ids))})
    call.skeleton.detach_outer()
    return {"continuations": found}


STAGES: dict[Kind, Callable[[Call, StageWriter], dict[str, Any]]] = {
    Kind.EMBED: embed,
    Kind.CALIBRATE: calibrate,
    Kind.MERGE: merge_slices,
    Kind.SCALES: scales,
    Kind.SOLVE: solve_group,
    Kind.PACK: pack,
    Kind.OUTER: outer,
    Kind.EVALUATE: evaluate,
    Kind.GENERATE: generate,
}
