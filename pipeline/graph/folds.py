"""The change of basis of one block that makes it easier to round, as values that stages pass on.

A group's columns are multiplied by ``scale_I`` and the layer that produces its input takes up the inverse: a norm by
its weight, a linear by its rows. For a norm the stored weight is rounded first and the scale derived from what was
stored, so the two cancel exactly whatever the dtype. What else reads the input and stays unquantized, as routers do,
follows by its columns, which are rounded to the stored dtype once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.quantize.awq import search_scales
from pipeline.quantize.smoothquant import search_smooth_scales
from pipeline.quantize.solve import SolveOptions
from pipeline.quantize.types import Scheme, Statistics
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.model import Skeleton
from pipeline.skeleton.smoothing import Fold, Producer, divide_norm, find_producers

MAX_SEARCHED_ROWS = 1 << 16
"""Rows of a group that its scale is searched on: of more, which all experts of a block together have, every second,
third and so on, so that memory stays bounded."""


@dataclass(frozen=True)
class ScaleResult:
    """The scale of one linear group.

    Attributes:
        scale_I: float32 [I]; the group's columns are multiplied by it. All ones when there is no producer.
        producer: The layer that takes up the inverse, or None when none was found.
        exponent: Exponent of the activation magnitude that won the search; 0 leaves the weights as they are. None where
            there is no producer, and nothing to search.
        norm: New weight (and bias) of a norm, in the stored dtype, by parameter name; empty for a linear.
    """

    scale_I: Tensor
    producer: Producer | None
    exponent: float | None
    norm: Mapping[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The result's tensors, for a file."""
        return {"scale": self.scale_I, **{f"norm.{name}": tensor for name, tensor in self.norm.items()}}

    @property
    def summary(self) -> dict[str, Any]:
        """The rest of the result, as JSON."""
        if self.producer is None:
            return {"producer": None, "exponent": None}
        producer = {
            "local_name": self.producer.local_name,
            "fold": self.producer.fold.value,
            "first_row": self.producer.first_row,
            "row_of_I": list(self.producer.row_of_I),
            "is_transposed": self.producer.is_transposed,
            "followers": list(self.producer.followers),
        }
        return {"producer": producer, "exponent": self.exponent}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], summary: Mapping[str, Any]) -> ScaleResult:
        """Return the result that ``tensors`` and ``summary`` were made from."""
        stored = summary["producer"]
        producer = None
        if stored is not None:
            rows = tuple(stored["row_of_I"])
            fold, first, transposed = Fold(stored["fold"]), stored["first_row"], stored["is_transposed"]
            followers = tuple(stored["followers"])
            producer = Producer(stored["local_name"], fold, first, rows, transposed, followers)
        norm = {name.removeprefix("norm."): t for name, t in tensors.items() if name.startswith("norm.")}
        return cls(tensors["scale"], producer, summary["exponent"], norm)


def scope_of(group: LinearGroup, local_names: Iterable[str]) -> list[str]:
    """Return which of a block's tensors a group's scale follows from: those of its expert where it is inside one."""
    return [name for name in local_names if name.startswith(f"{group.expert}." if group.expert else "")]


def search_group_scales(
    skeleton: Skeleton,
    group: LinearGroup,
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    scheme: Scheme,
    options: SolveOptions,
    prepare: Callable[[Tensor], Tensor] = lambda weight_OI: weight_OI,
    *,
    is_smooth: bool = False,
) -> ScaleResult:
    """Return the group's scale. The weights must be attached to the skeleton.

    Args:
        skeleton: The model.
        group: The linear group.
        weights: The block's checkpoint tensors by local name; those of its expert where the group is inside one.
        statistics: Of the group's input.
        scheme: The grid that the group will be rounded to.
        options: Of the search.
        prepare: What the group's rows [O, I] are to be before they are scaled and rounded.
        is_smooth: Whether scales are to make inputs easier to round, rather than weights err less.
    """
    (producer,) = find_producers(skeleton, [group])
    if producer is None:
        return ScaleResult(torch.ones_like(statistics.abs_sum_I), None, None, {})
    rows = torch.tensor(producer.row_of_I, device=statistics.abs_sum_I.device)

    def share(values_I: Tensor) -> Tensor:
        """Return for each channel the mean over those that are fed by its row, with which it must share a scale."""
        return _mean_by_row(values_I, rows)[rows]

    stride = -(-sum(linear.out_features for linear in group.linears) // MAX_SEARCHED_ROWS)
    stack_OI = torch.cat(
        [linear.to_rows(weights[linear.local_name + ".weight"])[::stride].float() for linear in group.linears]
    )
    weight_OI = prepare(stack_OI.to(rows.device))
    if is_smooth:
        found = search_smooth_scales(weight_OI, statistics, scheme, share)
    else:
        shared = replace(statistics, abs_sum_I=share(statistics.abs_sum_I))
        found = search_scales(weight_OI, shared, scheme, options)
    scale_I = share(found.scale_I)
    if producer.fold is Fold.ROWS:
        return ScaleResult(scale_I, producer, found.exponent, {})
    scale_I, norm = _fold_norm(weights, producer, scale_I)
    return ScaleResult(scale_I, producer, found.exponent, norm)


def _mean_by_row(values_I: Tensor, rows_I: Tensor) -> Tensor:
    count = torch.zeros(int(rows_I.max()) + 1, dtype=values_I.dtype, device=values_I.device)
    total = torch.zeros_like(count).index_add_(0, rows_I, values_I)
    return total / count.index_add_(0, rows_I, torch.ones_like(values_I))


def _fold_norm(weights: Mapping[str, Tensor], producer: Producer, scale_I: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the scale that the rounded norm weight stands for, and the norm's new parameters."""
    stored = weights[producer.local_name + ".weight"]
    gain = stored.to(scale_I) + (1.0 if producer.fold is Fold.SCALE_PLUS_ONE else 0.0)
    rounded = divide_norm(stored.to(scale_I), scale_I, producer.fold).to(stored.dtype)
    folded = rounded.to(scale_I) + (1.0 if producer.fold is Fold.SCALE_PLUS_ONE else 0.0)
    exact_I = gain / folded
    usable = torch.isfinite(exact_I) & (exact_I > 0)
    exact_I = torch.where(usable, exact_I, torch.ones_like(exact_I))
    norm = {"weight": torch.where(usable, rounded, stored.to(rounded.device))}
    bias = weights.get(producer.local_name + ".bias")
    if bias is not None:
        norm["bias"] = (bias.to(scale_I) / exact_I).to(bias.dtype)
    return exact_I, norm


def fold_block(weights: Mapping[str, Tensor], results: Iterable[ScaleResult]) -> dict[str, Tensor]:
    """Return the block's tensors by local name with every producer's share taken up.

    Tensors that no producer owns are the same objects as before; divided rows of linears are float32, so that a
    solver sees them unrounded.
    """
    folded = dict(weights)
    for result in results:
        producer = result.producer
        if producer is None:
            continue
        for parameter, tensor in result.norm.items():
            folded[f"{producer.local_name}.{parameter}"] = tensor
        for parameter in ("weight", "bias") if producer.fold is Fold.ROWS else ():
            name = f"{producer.local_name}.{parameter}"
            if name in folded:
                folded[name] = _divide_rows(folded[name], producer, result.scale_I)
        for name in (f"{follower}.weight" for follower in producer.followers):
            if name in folded:
                folded[name] = folded[name].float() * result.scale_I.to(folded[name].device)
    return folded


def _divide_rows(tensor: Tensor, producer: Producer, scale_I: Tensor) -> Tensor:
    """Return a linear's stored weight or bias in float32 with the rows that feed the group divided."""
    scale_R = torch.empty(producer.num_rows, device=tensor.device)
    scale_R[list(producer.row_of_I)] = scale_I.to(tensor.device)
    row_axis = 1 if producer.is_transposed and tensor.dim() == 2 else 0
    factors = torch.ones(tensor.shape[row_axis], device=tensor.device)
    factors[producer.first_row : producer.first_row + producer.num_rows] = scale_R
    return tensor.float() / (factors if row_axis == tensor.dim() - 1 else factors[:, None])
