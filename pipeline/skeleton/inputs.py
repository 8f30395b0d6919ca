"""Linears that take their inputs through a function, as engines do that round these to the codes of a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

from torch import Tensor, nn

InputFunction = Callable[[Tensor], Tensor]
"""What becomes of a linear's input [..., in_features]: another tensor of the same shape and dtype."""


@contextmanager
def taken_through(net: nn.Module, functions: Mapping[str, InputFunction]) -> Iterator[None]:
    """Within the context, linears of ``net``, by name, take their inputs through functions. Linears that follow each
    other on one input with one function, as q, k and v do, share what it gives."""
    last = _Last()
    with ExitStack() as stack:
        for name, function in functions.items():
            handle = net.get_submodule(name).register_forward_pre_hook(_hook(last, function))
            stack.callback(handle.remove)
        yield


def _hook(last: _Last, function: InputFunction) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (last.given(function, args[0]), *args[1:])

    return before


class _Last:
    """What a function last gave, as long as what it was given exists and is what it was."""

    def __init__(self) -> None:
        self._function: InputFunction | None = None
        self._of: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._given: Tensor | None = None

    def given(self, function: InputFunction, x: Tensor) -> Tensor:
        """Return what ``function`` gives of ``x``."""
        is_known = self._function is function and self._of() is x and self._version == x._version
        if self._given is None or not is_known:
            self._given = None  # never two of them
            self._function, self._of, self._version, self._given = function, ref(x), x._version, function(x)
        return self._given
