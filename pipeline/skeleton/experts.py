"""Experts of a mixture as linears of their own.

transformers keeps the experts of a block in one module with fused parameters, ``gate_up_proj`` [experts, 2 x width,
hidden] and ``down_proj`` [experts, hidden, width], and checkpoints hold a gate, an up and a down for each expert, or
these parameters as they are. Some experts have no gate, and ``up_proj`` [experts, width, hidden] in its place. Here
the fused module is replaced by one that has a child for each expert with two or three linears: everything that looks
at linears (groups, statistics, solves, formats) then sees experts as any others, under the names of the checkpoint.

Which modules are experts, how their parameters are laid out and what stands between up and down is what transformers'
own classes say of themselves; nothing is listed per architecture. Layouts that are not plain matrices are refused.

Tokens go to the experts that the router chose. Calibration may have every expert see all tokens (`all_tokens`): what
the block gives is the same up to rounding, since what an expert makes of tokens that are not its own is dropped, and
linears that read one tensor are then found to share it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UnsupportedArchitectureError

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
"""transformers' names of the fused parameters."""

PARTS: Mapping[str, tuple[str, ...]] = {GATE_UP: ("gate_proj", "up_proj"), UP: ("up_proj",), DOWN: ("down_proj",)}
"""The linears that are fused in each, in order."""

WITH_GATE, WITHOUT_GATE = (GATE_UP, DOWN), (UP, DOWN)
"""The fused parameters of experts."""

Activation = Callable[[Tensor], Tensor]
"""What the down projection reads, [tokens, width], from gate and up side by side, [tokens, 2 x width], or from up."""


class Expert(nn.Module):
    """One expert: ``down(activation(gate(x), up(x)))``, or without a gate ``down(activation(up(x)))``."""

    def __init__(self, hidden: int, width: int, has_gate: bool, activation: Activation, dtype: torch.dtype) -> None:
        """Make the linears on the meta device."""
        super().__init__()
        self._entering = PARTS[GATE_UP if has_gate else UP]
        for name in self._entering:
            self.add_module(name, nn.Linear(hidden, width, bias=False, device="meta", dtype=dtype))
        self.down_proj = nn.Linear(width, hidden, bias=False, device="meta", dtype=dtype)
        self._activation = activation

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return [tokens, hidden] of [tokens, hidden]."""
        entering = torch.cat([self.get_submodule(name)(x_TH) for name in self._entering], -1)
        output: Tensor = self.down_proj(self._activation(entering))
        return output


class Experts(nn.Module):
    """The experts of one block, children by number.

    Attributes:
        fused: transformers' fused parameters.
        sees_all: Whether every expert is run on all tokens.
        rows: The tokens that the router sent to each expert in the last call, as positions in its input.
    """

    def __init__(self, experts: Sequence[Expert], fused: tuple[str, ...]) -> None:
        """Hold the experts in order."""
        super().__init__()
        self.fused = fused
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.sees_all = False
        self.rows: list[Tensor] = []

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return for each token the weighted sum of what its experts make of it.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], their weights.
        """
        if hidden_states.is_meta:
            return self._trace(hidden_states)
        output = torch.zeros_like(hidden_states)
        chosen = [torch.where(top_k_index == number) for number in range(len(self._modules))]
        self.rows = [rows for rows, _ in chosen]
        for expert, (rows, places) in zip(self.children(), chosen, strict=True):
            if self.sees_all:
                own = expert(hidden_states)[rows]
            elif rows.numel():
                own = expert(hidden_states[rows])
            else:
                continue
            # A token is sent to an expert once, so no row is added to twice: the order is fixed.
            output.index_add_(0, rows, (own * top_k_weights[rows, places, None]).to(output.dtype))
        return output

    def fused_shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of transformers' fused parameter."""
        shapes = [self.get_submodule(f"0.{part}").get_parameter("weight").shape for part in PARTS[parameter]]
        return len(self._modules), sum(rows for rows, _ in shapes), shapes[0][1]

    def _trace(self, hidden_states: Tensor) -> Tensor:
        """Run every expert on a tensor without content: all on the same, or each on one of its own."""
        for expert in self.children():
            expert(hidden_states if self.sees_all else hidden_states.clone())
        return torch.empty_like(hidden_states)


def split_experts(net: nn.Module) -> dict[str, Experts]:
    """Replace every fused experts module of ``net``, and return what took its place by its name.

    Raises:
        UnsupportedArchitectureError: when a layout is not plain matrices for each expert.
    """
    found = {name: module for name, module in net.named_modules() if _fused_in(module)}
    split = {}
    for name, module in found.items():
        _require_plain(type(net).__name__, name, module)
        fused, down = _fused_in(module), module.get_parameter(DOWN)
        activation = _activation_alone(module)
        number, hidden, width = down.shape
        has_gate = fused == WITH_GATE
        experts = Experts([Expert(hidden, width, has_gate, activation, down.dtype) for _ in range(number)], fused)
        net.set_submodule(name, experts.eval().requires_grad_(False))
        split[name] = experts
    return split


@contextmanager
def all_tokens(module: nn.Module) -> Iterator[None]:
    """Within the context, every expert in ``module`` is run on all tokens."""
    found = [experts for experts in module.modules() if isinstance(experts, Experts)]
    for experts in found:
        experts.sees_all = True
    try:
        yield
    finally:
        for experts in found:
            experts.sees_all = False


def expert_of(local_name: str, block: nn.Module) -> str:
    """Return the name inside the block of the expert that a linear is a part of; empty when it is of none."""
    owner = local_name.rpartition(".")[0]
    return owner if isinstance(block.get_submodule(owner), Expert) else ""


def find_routers(block: nn.Module) -> tuple[str, ...]:
    """Return the names inside the block of what decides where tokens go and with which weight: layers beside the
    experts with a row for each of them, or a single one (the gate of a shared expert)."""
    found = []
    for name, experts in block.named_modules():
        if isinstance(experts, Experts):
            beside = name.rpartition(".")[0]
            for path, module in block.get_submodule(beside).named_modules(prefix=beside):
                weight = module._parameters.get("weight")
                is_inside = path.startswith(f"{name}.")
                if weight is not None and weight.dim() == 2 and not is_inside:
                    found += [path] if weight.shape[0] in (1, len(experts._modules)) else []
    return tuple(dict.fromkeys(found))


def fused_names(experts: Mapping[str, Experts]) -> dict[str, tuple[int, ...]]:
    """Return the names that transformers has for the parameters that were split, with their shapes."""
    return {f"{name}.{part}": own.fused_shape(part) for name, own in experts.items() for part in own.fused}


def per_expert_name(renamed: str, fused: str, sources: Sequence[str], pattern: str) -> str | None:
    """Return the name, in the split model, of a tensor that transformers would merge into a fused parameter; None when
    it is not one expert's gate, up or down.

    Args:
        renamed: The tensor's name after renaming, before merging: ``layers.0.mlp.experts.3.w1.weight``.
        fused: Name of the fused parameter: ``layers.0.mlp.experts.gate_up_proj``.
        sources: Patterns of all tensors that are merged with it, in the order in which they are put together.
        pattern: The one among them that the tensor is meant by: ``.experts.*.w1.weight``.
    """
    owner, _, parameter = fused.rpartition(".")
    parts = PARTS.get(parameter, ())
    number = re.search(pattern.replace(".*.", r"\.(\d+)\."), renamed) if ".*." in pattern else None
    if number is None or len(parts) != len(sources):
        return None
    return f"{owner}.{number[1]}.{parts[list(sources).index(pattern)]}.weight"


def _fused_in(module: nn.Module) -> tuple[str, ...]:
    """Return the fused parameters of a module; none when it is no experts'."""
    if all(name in module._parameters for name in WITH_GATE):
        return WITH_GATE
    has_none = getattr(module, "has_gate", None) is False and all(name in module._parameters for name in WITHOUT_GATE)
    return WITHOUT_GATE if has_none else ()


def _require_plain(architecture: str, name: str, module: Any) -> None:
    fused = _fused_in(module)
    # What transformers' decorator of experts' classes writes down; a class without it is of a layout of its own.
    wanted = {
        "is_concatenated": True,
        "is_transposed": False,
        "has_gate": fused == WITH_GATE,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    other = [key for key, value in wanted.items() if getattr(module, key, None) is not value]
    is_plain = not other and module.down_proj.dim() == 3 and set(module._parameters) == set(fused)
    if not is_plain:
        raise UnsupportedArchitectureError(
            f"the experts of {architecture} ({name}) are not a plain gate, up and down each"
            + (f" ({', '.join(other)})" if other else ""),
            hint="this architecture is not supported yet; see docs/reference/architectures.md",
        )


def _activation_alone(module: Any) -> Activation:
    """Return the module's own activation, and take the fused parameters from the module, which it holds."""
    fused = _fused_in(module)
    activation: Activation = module._apply_gate if fused == WITH_GATE else module.act_fn
    for parameter in fused:
        del module._parameters[parameter]
    return activation
