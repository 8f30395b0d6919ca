"""How a model calls its blocks: the arguments besides the hidden states, looked through, replaced, moved, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, ...]
"""Where something is in nested tuples, lists and dicts: positions and keys, from the outside in."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block besides its hidden states, as the model's own forward passes them.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
        hidden_by_name: Whether the hidden states are passed by keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool

    def run(self, block: Callable[..., Any], hidden_BLH: Tensor) -> Tensor:
        """Return the output hidden states of a block (or of its forward function), [batch, length, hidden]."""
        output = self.run_raw(block, hidden_BLH)
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden

    def run_raw(self, block: Callable[..., Any], hidden_BLH: Tensor) -> Any:
        """Return what the block returns, as it is."""
        if self.hidden_by_name:
            return block(*self.args, hidden_states=hidden_BLH, **self.kwargs)
        return block(hidden_BLH, *self.args, **self.kwargs)

    def leaves(self) -> dict[Place, Any]:
        """Return every argument, of tuples, lists and dicts what is in them, by where it is."""
        return dict(_leaves((self.args, self.kwargs)))

    def replaced(self, tensors: Mapping[Place, Tensor]) -> BlockCall:
        """Return the call with other tensors [batch, length, columns], by where they are, in the shapes of those that
        are there."""
        args, kwargs = _with_leaves((self.args, self.kwargs), tensors)
        return BlockCall(args, kwargs, self.hidden_by_name)

    def places(self) -> dict[Place, int]:
        """Return all places among the arguments, with the sizes of those that hold others in some class's own way: a
        block that writes into what is passed on to the next changes this."""
        return {path: len(leaf) if isinstance(leaf, MutableMapping) else 0 for path, leaf in self.leaves().items()}

    def to(self, device: torch.device | str) -> BlockCall:
        """Return the call with every tensor in it on ``device``."""
        return BlockCall(_move(self.args, device), _move(self.kwargs, device), self.hidden_by_name)


BlockForward = Callable[..., Any]
"""A block's own forward, bound to the block."""


def cache_among(calls: Sequence[BlockCall]) -> Any:
    """Return the key-value cache that blocks were called with, or None: then every pass begins with the first token."""
    from transformers.cache_utils import Cache

    arguments = (value for call in calls for value in (*call.args, *call.kwargs.values()))
    return next((value for value in arguments if isinstance(value, Cache)), None)


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values are the same, of tensors, tuples, lists and dicts all that is in them."""
    match a:
        case Tensor():
            return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
        case tuple() | list():
            return isinstance(b, type(a)) and len(a) == len(b) and all(map(is_same, a, b))
        case dict():
            return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
        case _:
            return type(a) is type(b) and (a == b or a is b)


def _leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    match value:
        case tuple() | list():
            for number, item in enumerate(value):
                yield from _leaves(item, (*path, number))
        case dict():
            for key, item in value.items():
                yield from _leaves(item, (*path, key))
        case _:
            yield path, value


def _with_leaves(value: Any, tensors: Mapping[Place, Tensor], path: Place = ()) -> Any:
    match value:
        case tuple() | list():
            return type(value)(_with_leaves(item, tensors, (*path, number)) for number, item in enumerate(value))
        case dict():
            return {key: _with_leaves(item, tensors, (*path, key)) for key, item in value.items()}
        case _:
            return tensors[path].reshape(value.shape) if path in tensors else value


def _move(value: Any, device: torch.device | str) -> Any:
    match value:
        case Tensor():
            return value.to(device)
        case tuple() | list():
            return type(value)(_move(item, device) for item in value)
        case dict():
            return {key: _move(item, device) for key, item in value.items()}
        case _:
            return value
