"""A release folder as a model: its packed tensors read by the project's own loader, block by block.

Everything comes from the folder's files: the names and shapes from safetensors headers, the grids from
``quantization_config``. The facts in ``bitmill.json`` are compared with them, not relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CorruptReleaseError, FormatError, PipelineError
from pipeline.facts import FACTS_FILE, Check, ReleaseFacts, Sample
from pipeline.quantize.types import Scheme
from pipeline.skeleton.groups import LinearRef, linear_groups
from pipeline.skeleton.limits import vocabulary_size
from pipeline.skeleton.model import Skeleton, dense_logits
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.strict_json import parse_json_object
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import read_tensors
from pipeline.validate.agreement import Agreement, compare_choice, compare_choices
from pipeline.validate.dense import DenseReader, scale_problems
from pipeline.validate.gates import check_scales
from pipeline.validate.generation import BlockCache

PACKED_SUFFIXES = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
)
"""Last name parts of the tensors that stand for a quantized ``weight``."""

KEPT_BYTES = 500_000_000
"""Blocks are kept for the next sequence up to this much, as by a worker."""


def read_facts(folder: Path) -> ReleaseFacts:
    """Return the facts of the release in ``folder``.

    Raises:
        CorruptReleaseError: when they are missing or unreadable.
    """
    try:
        data = (folder / FACTS_FILE).read_bytes()
    except OSError as error:
        raise _unreadable(str(folder), error) from error
    return parse_facts(data, str(folder))


def parse_facts(data: bytes, where: str) -> ReleaseFacts:
    """Return the facts that were read from the release at ``where``.

    Raises:
        CorruptReleaseError: when they are none.
    """
    try:
        return ReleaseFacts.model_validate_json(data)
    except ValueError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> CorruptReleaseError:
    return CorruptReleaseError(
        f"{FACTS_FILE} of {where} cannot be read: {error!s:.300}", hint="is this a release made by bitmill?"
    )


class ReleaseModel:
    """A release that computes: the reference that engines are compared with.

    Attributes:
        index: Where its tensors lie.
        skeleton: The model without weights.
        groups: The linear groups of each block.
        tokenizer: The release's own.
    """

    def __init__(self, folder: Path) -> None:
        """Read headers and config of the release in ``folder``.

        Raises:
            PipelineError: when they are damaged or do not belong together.
        """
        self._folder = folder
        self.index = read_folder_index(folder)
        config = parse_json_object((folder / "config.json").read_bytes())
        self.skeleton = Skeleton(folder)
        shapes = {name: entry.shape for name, (_, entry) in self.index.entries.items()}
        packed = {name.rpartition(".")[0] + ".weight" for name in shapes if name.endswith(PACKED_SUFFIXES)}
        plain = {name: shape for name, shape in shapes.items() if not name.endswith(PACKED_SUFFIXES)}
        self.skeleton.bind({**plain, **dict.fromkeys(packed)})
        self.groups = tuple(linear_groups(self.skeleton, block) for block in range(self.skeleton.num_blocks))
        self._reader = DenseReader(config.get("quantization_config"), self.linears())
        blocks = map(self.skeleton.block, range(self.skeleton.num_blocks))
        dense_bytes = sum(tensor.nbytes for block in blocks for tensor in block.state_dict().values())
        self._load = BlockCache(self._read_block, self.skeleton.dense, KEPT_BYTES, dense_bytes)
        self.tokenizer = TextTokenizer(folder)

    def linears(self) -> list[LinearRef]:
        """Return the linears of the blocks, in order."""
        return [linear for block in self.groups for group in block for linear in group.linears]

    def schemes(self) -> dict[str, Scheme | None]:
        """Return the grid of every linear of the blocks by its name, None where it is not quantized."""
        return {linear.name: self._reader.scheme(linear.name) for linear in self.linears()}

    def _read_block(self, index: int) -> dict[str, Tensor]:
        names = self.skeleton.block_tensors(index)
        return self._reader.dense(names, self._tensors(list(names.values())))

    def _tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        stored = [stored for name in names for stored in self._reader.stored_names(name)]
        missing = [name for name in stored if name not in self.index.entries]
        if missing:
            raise FormatError(f"the release has no tensor {missing[0]}", hint="quantization_config and files disagree")
        return read_tensors(self._folder, self.index, stored)

    def attach(self) -> None:
        """Put what lies outside the blocks in place; done once before computing."""
        names = self.skeleton.outer_tensors()
        tensors = read_tensors(self._folder, self.index, names.values())
        self.skeleton.attach_outer({model: tensors[name] for model, name in names.items()})

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return float32 logits [length, vocabulary] of one sequence."""
        with self._rounding_inputs():
            (logits_BLV,) = dense_logits(self.skeleton, [torch.tensor([list(token_ids)])], self._load)
        return logits_BLV[0]

    def logits_of(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield float32 logits [length, vocabulary] of each sequence; every block is read once, and none is kept."""
        tokens = [torch.tensor([list(ids)]) for ids in sequences]
        with self._rounding_inputs():
            for logits_BLV in dense_logits(
                self.skeleton, tokens, lambda index: self.skeleton.dense(index, self._read_block(index))
            ):
                yield logits_BLV[0]

    def _rounding_inputs(self) -> AbstractContextManager[None]:
        """Within the context, linears round their inputs where the release's do."""
        return self.skeleton.inputs_taken_through(self._reader.input_functions())

    def problems(self) -> tuple[list[str], int]:
        """Return what is wrong with the packed linears, one line each, and how many there are."""
        found: list[str] = []
        count = 0
        for index in range(self.skeleton.num_blocks):
            names = self.skeleton.block_tensors(index)
            tensors = self._tensors(list(names.values()))
            for name in names.values():
                scale_OG = self._reader.scales(name, tensors)
                if scale_OG is not None:
                    count += 1
                    found.extend(scale_problems(name.removesuffix(".weight"), scale_OG))
        return found, count


def check_release(folder: Path, facts: ReleaseFacts, max_tokens: int) -> list[Check]:
    """Return what a release's own files say: structure, scales, and whether its weights choose the recorded tokens.

    Args:
        folder: The release's files.
        facts: What it says about itself.
        max_tokens: Tokens that a recorded continuation was allowed; a shorter one was ended by an end token.
    """
    try:
        model = ReleaseModel(folder)
        problems, count = model.problems()
        model.attach()
    except PipelineError as error:
        return [Check(name="structure", passed=False, detail=error.message)]
    stated = sum(module.group_size != 0 for module in facts.modules)
    detail = f"{count} quantized linears read by the project's own loader, {stated} stated"
    return [
        Check(name="structure", passed=count == stated and count > 0, detail=detail),
        check_scales(problems, count),
        _check_samples(model, facts.verdict.samples, max_tokens),
    ]


def _check_samples(model: ReleaseModel, samples: Sequence[Sample], max_tokens: int) -> Check:
    """Return whether the release's weights choose the tokens that were recorded when it was made."""
    prompts = [model.tokenizer.encode(sample.prompt, with_special=True) for sample in samples]
    sequences = [[*ids, *sample.ids] for ids, sample in zip(prompts, samples, strict=True)]
    size = vocabulary_size(model.skeleton)
    is_known = [all(0 <= token < size for token in ids) for ids in sequences]
    logits = model.logits_of(list(compress(sequences, is_known)))
    total, faults = Agreement(), []
    for sample, prompt_ids, ids, known in zip(samples, prompts, sequences, is_known, strict=True):
        if known:
            logits_LV = next(logits)
            found = compare_choices(logits_LV, ids, len(prompt_ids))
            if len(sample.ids) < max_tokens:
                found += compare_choice(logits_LV[-1], model.tokenizer.end_ids)
        else:
            found = Agreement(len(ids), 0, math.inf)
        total += found
        if not found.is_near:
            faults.append(f"{sample.prompt!r}: {found.words}")
    figures = {"tokens_agreeing": float(total.agreeing), "tokens_total": float(total.total)}
    detail = "; ".join(faults) or f"{len(samples)} recorded continuations: {total.words}"
    return Check(name="generation", passed=not faults and total.is_near, detail=detail, figures=figures)
