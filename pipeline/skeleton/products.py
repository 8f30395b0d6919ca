"""Matrix products of decoder blocks from bfloat16 factors.

Processors multiply bfloat16 several times as fast as float32 and add up in float32. Engines compute a model in 16 bit,
so this is closer to what a release will meet than float32 is. Only products change: of linears, and of attention where
a model calls torch's own. Norms, residual streams, rotary tables and everything between two blocks stay float32.

Other float32 products may be made from bfloat16 factors too, with float32 sums and results: second moments, whose
factors the linears round likewise, and the output head. oneDNN does it where it is faster, on CPUs with AMX; on others
its float32 products are exact, and twice as fast as MKL's on some. On a GPU second moments are given what the linears
multiply (``calibrate/collections.py``).

Where a CPU has no instructions for it (x86 before AVX-512 BF16), a bfloat16 product takes four times as long as one of
float32. There the rounded factors are multiplied as float32, where every product of two is exact, and the result is
rounded: the same but for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.precision import Precision

DTYPES = {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT32: torch.float32}
"""What a linear's weight is kept in while its block is attached."""


def products(precision: Precision) -> AbstractContextManager[Any]:
    """Within the context, products with bfloat16 weights are made, and attention is computed, in ``precision``."""
    return _bfloat16_products() if precision is Precision.BFLOAT16 else nullcontext()


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if _capabilities().get("amx_bf16"):
        matmul.fp32_precision = "bf16"
    try:
        with _BFloat16Products():
            yield
    finally:
        matmul.fp32_precision = before


def prefer_onednn() -> None:
    """Have this process's float32 products made by oneDNN where these are float32 then too, and faster: on x86 that is
    not Intel's and has no AMX.

    torch makes them with MKL, which takes twice as long there. That oneDNN may round factors is how it is asked for; it
    does so where it is faster, with AMX. On Intel's processors MKL is as fast or twice as fast.
    """
    known = _capabilities()
    if (
        known.get("architecture") == "x86_64"
        and not known.get("amx_bf16")
        and not _is_intel(str(known.get("cpu_name")))
    ):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


def _is_intel(cpu_name: str) -> bool:
    return cpu_name.startswith("Intel")


@cache
def _capabilities() -> Mapping[str, Any]:
    """What torch knows of this machine's processor."""
    return torch.cpu.get_capabilities()


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products of bfloat16; of other processors than x86 it is taken for
    granted."""
    known = _capabilities()
    is_without = known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16"))
    return device.type != "cpu" or not is_without


def _product(multiply: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """Return the bfloat16 product of bfloat16 factors, summed up in float32."""
    if _multiplies_bfloat16(factors[0].device):
        return multiply(*factors)
    return multiply(*(factor.float() for factor in factors)).to(torch.bfloat16)


class _BFloat16Products(TorchFunctionMode):
    """Replaces what makes products. Linears that follow each other on one input, as q, k and v do, round it once."""

    def __init__(self) -> None:
        super().__init__()
        self._rounded = _Rounded()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        replacement = _REPLACEMENTS.get(func)
        return func(*args, **kwargs) if replacement is None else replacement(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + bias in the dtype of x, ``input``; the sum with the bias is made there."""
        if weight.dtype is not torch.bfloat16:
            return functional.linear(input, weight, bias)
        output = _product(functional.linear, self._rounded.of(input), weight).to(input.dtype)
        return output if bias is None else output.add_(bias)


class _Rounded:
    """The bfloat16 form of the last tensor that was asked for, as long as that exists and is what it was."""

    def __init__(self) -> None:
        self._of: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._tensor: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return ``x`` in bfloat16; never kept where gradients are wanted: it would be part of two graphs."""
        if torch.is_grad_enabled():
            return x.to(torch.bfloat16)
        if self._of() is not x or self._version != x._version or self._tensor is None:
            self._tensor = None  # never two of them
            self._of, self._version, self._tensor = ref(x), x._version, x.to(torch.bfloat16)
        return self._tensor


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    """Return bias + x W in the dtype of ``x``: the product of GPT-2's transposed linears."""
    if weight.dtype is not torch.bfloat16 or kwargs:
        return torch.addmm(bias, x, weight, **kwargs)
    return _product(torch.matmul, x.to(torch.bfloat16), weight).to(x.dtype).add_(bias)


def _matmul(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
    """Return a b in the dtype of the factor that is no linear's weight: some blocks, as Mamba's, multiply by a linear's
    weight without calling it."""
    if kwargs or a.dtype == b.dtype or torch.bfloat16 not in (a.dtype, b.dtype):
        return torch.matmul(a, b, **kwargs)
    wide = b.dtype if a.dtype is torch.bfloat16 else a.dtype
    return _product(torch.matmul, a.to(torch.bfloat16), b.to(torch.bfloat16)).to(wide)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
) -> Tensor:
    """Return attention in the dtype of ``query``."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(torch.bfloat16)
    query16, key16, value16 = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query16, key16, value16, attn_mask, *rest, **more).to(query.dtype)


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    functional.scaled_dot_product_attention: _attention,
}
"""By the function of torch that a block calls."""
