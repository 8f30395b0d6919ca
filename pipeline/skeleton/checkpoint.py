"""Which tensor of a checkpoint is which parameter of a model, as transformers would load it.

transformers renames tensors while loading, merges those of experts and stacks some others; what it would do, its own
table for the model's class says. Everything else that it would convert is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import UnsupportedArchitectureError
from pipeline.skeleton.experts import PARTS, Experts, fused_names, per_expert_name
from pipeline.skeleton.modules import is_linear

Shapes = Mapping[str, tuple[int, ...] | None]
"""Shapes of a checkpoint's tensors; None where a format packs them."""


def fused_parts(net: Any, experts: Mapping[str, Experts], shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """Return which checkpoint tensors hold all experts of a block, as the model fuses them, with names for their parts
    in order: those that checkpoints with a tensor for each expert have, so that whatever loads these loads the parts.

    Args:
        net: The transformers model.
        experts: Its experts by name.
        shapes: Of all tensors.
    """
    renamings, converters = _conversions(net)
    fused = fused_names(experts)
    state = {**net.state_dict(), **dict.fromkeys(fused, True)}
    found = {}
    for name, shape in shapes.items():
        model_name, converted = _renamed(net, name, renamings, converters, state)
        if model_name in fused and converted is None and shape == fused[model_name]:
            owner, _, parameter = model_name.rpartition(".")
            stored = name.removesuffix(f".{parameter}") if name.endswith(f".{parameter}") else owner
            leaves = _expert_leaves(parameter, converters)
            found[name] = tuple(f"{stored}.{number}.{leaf}" for number in range(shape[0]) for leaf in leaves)
    return found


def stack_parts(net: Any, shapes: Shapes) -> dict[str, str]:
    """Have parameters that transformers stacks from several tensors while loading made of these tensors, and return
    what they are called in ``net`` then, by their names in the checkpoint. Linears are left alone."""
    renamings, converters = _conversions(net)
    positions = {pattern: number for own in _stacked_sources(converters) for number, pattern in enumerate(own)}
    state = net.state_dict()
    found: dict[str, dict[int, str]] = {}
    for name in shapes if positions else ():
        model_name, pattern = _renamed(net, name, renamings, converters, state)
        if pattern in positions and model_name in state:
            found.setdefault(model_name, {})[positions[pattern]] = name
    stacked: dict[str, str] = {}
    for model_name, names in found.items():
        owner, _, leaf = model_name.rpartition(".")
        module, parts = net.get_submodule(owner), [shapes[names[number]] for number in sorted(names)]
        rows = sum(shape[0] for shape in parts if shape)
        if not is_linear(module) and all(parts) and rows == len(state[model_name]):
            made = stack_parameter(module, leaf, [shape for shape in parts if shape])
            stacked |= {names[number]: f"{owner}.{part}" for number, part in zip(sorted(names), made, strict=True)}
    return stacked


def checkpoint_names(net: Any, names: Iterable[str], experts: Mapping[str, Experts]) -> dict[str, str]:
    """Return model names by checkpoint name, as transformers would load them; experts keep tensors of their own.

    Raises:
        UnsupportedArchitectureError: when a tensor would be converted (merged, split, transposed) and not only renamed.
    """
    renamings, converters = _conversions(net)
    # Per pattern, the patterns of all tensors that are merged with those it means, where merging is all that is done.
    merged = {pattern: sources for sources in _merged_sources(converters) for pattern in sources}
    fused = fused_names(experts)
    state = {**net.state_dict(), **dict.fromkeys(fused, True)}
    found = {}
    for name in names:
        model_name, converted = _renamed(net, name, renamings, converters, state)
        if converted is None and model_name in fused:
            raise UnsupportedArchitectureError(
                f"{name} of {type(net).__name__} holds all experts of a block in another order of its axes than "
                f"{list(fused[model_name])}, which is not supported yet",
                hint="see docs/reference/architectures.md",
            )
        # Of what the model has no use for, as blocks that predict further tokens, nobody asks how it is converted.
        if converted is not None and model_name in state:
            renamed, _ = _renamed(net, name, renamings, [], None)
            own_name = None
            if model_name.rpartition(".")[0] in experts and converted in merged:
                own_name = per_expert_name(renamed, model_name, merged[converted], converted)
            if own_name is None:
                raise UnsupportedArchitectureError(
                    f"{name} of {type(net).__name__} is not stored as the model uses it ({converted}): converted "
                    "layouts other than one tensor for each expert are not supported yet",
                    hint="see docs/reference/architectures.md",
                )
            model_name = own_name
        found[name] = model_name
    return found


def _conversions(net: Any) -> tuple[list[Any], list[Any]]:
    """Return transformers' renamings and converters of tensors for a model while it loads a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(net)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    return renamings, [t for t in transforms if isinstance(t, WeightConverter)]


def _renamed(
    net: Any, name: str, renamings: list[Any], converters: list[Any], state: dict[str, Any] | None
) -> tuple[str, str | None]:
    """Return a checkpoint tensor's name in the model, and the pattern by which it is converted, if it is."""
    from transformers.core_model_loading import rename_source_key

    prefix = net.base_model_prefix if state is not None else None
    found: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, state)
    return found


def _merged_sources(converters: Iterable[Any]) -> Iterator[Sequence[str]]:
    """Yield the patterns of tensors that are merged, and nothing else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    for converter in converters:
        if {type(operation) for operation in converter.operations} <= {MergeModulelist, Concatenate}:
            yield converter.source_patterns


def _stacked_sources(converters: Iterable[Any]) -> Iterator[Sequence[str]]:
    """Yield the patterns of tensors that are put one above the other in one parameter, and nothing else."""
    from transformers.core_model_loading import Concatenate

    for converter in converters:
        sources, operations = converter.source_patterns, converter.operations
        is_stacking = [(type(own), getattr(own, "dim", None)) for own in operations] == [(Concatenate, 0)]
        if is_stacking and not any(".*." in pattern for pattern in sources):
            yield sources


def stack_parameter(module: nn.Module, leaf: str, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """Replace a parameter by parts of it that stand for it, one above the other, and return their names."""
    whole = module._parameters.pop(leaf)
    names = [f"{leaf}_part{number}" for number in range(len(shapes))]
    for name, shape in zip(names, shapes, strict=True):
        part = torch.empty(shape, dtype=whole.dtype if whole is not None else None, device="meta")
        module.register_parameter(name, nn.Parameter(part, requires_grad=False))
    kind = type(module)
    stacked = property(lambda self: torch.cat([self._parameters[name] for name in names]))
    module.__class__ = type(kind.__name__, (kind,), {leaf: stacked})
    return names


def _expert_leaves(parameter: str, converters: Iterable[Any]) -> tuple[str, ...]:
    """Return what the parts of a fused parameter are called in checkpoints with a tensor for each expert, after the
    expert's number: what transformers merges into it, or the model's own names where it knows of none."""
    parts = tuple(f"{part}.weight" for part in PARTS[parameter])
    merging = [converter for converter in converters if str(converter.target_patterns[0]).endswith(parameter)]
    for sources in _merged_sources(merging):
        leaves = tuple(pattern.rpartition(".*.")[2] for pattern in sources)
        if len(leaves) == len(parts) and all(".*." in pattern for pattern in sources):
            return leaves
    return parts
