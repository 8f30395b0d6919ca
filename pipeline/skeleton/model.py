"""A transformers model on the meta device whose decoder blocks are run one at a time.

Design. The model class comes from transformers; nothing is listed per architecture. The decoder blocks are the module
list that ``num_hidden_layers`` counts. The model's own ``forward`` drives everything outside the blocks: it is run
with each block's ``forward`` replaced by a function of ours, which gives

- the hidden states that enter the first block (embedding, positions, scaling),
- the arguments that each block is called with (masks, rotary tables, per-layer variants), and
- the logits of given final hidden states (final norm, head, soft caps).

Weights are attached to one block for the time it runs and taken off again, so memory holds one block whatever the
depth. Parameters outside the blocks that are not needed are zero-stride zeros: real tensors without storage.

What the hidden states that enter the first block follow from is found by trying: a parameter on the meta device has no
content, so whatever is computed while it is there does not depend on it. They are made with all others on the meta
device, so one that was missed would be an error, never other numbers.

Experts of a mixture become linears of their own (``experts.py``), under the names that checkpoints have for them.

Arguments of blocks that follow from the tokens (embeddings for each layer) are carried along beside hidden states.

Refused: models whose block arguments are more than that or come from other blocks, checkpoints that transformers would
convert tensor by tensor while loading (but for experts that it merges), and classes that need remote code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import CorruptWeightsError, UnsupportedArchitectureError
from pipeline.precision import Precision
from pipeline.skeleton.calls import BlockCall, BlockForward, Place, cache_among, is_same
from pipeline.skeleton.checkpoint import Shapes, checkpoint_names, fused_parts, stack_parts
from pipeline.skeleton.experts import split_experts
from pipeline.skeleton.inputs import InputFunction, taken_through
from pipeline.skeleton.modules import is_linear, set_tensor
from pipeline.skeleton.products import DTYPES, products
from pipeline.skeleton.tables import Tables

PROBE_TOKENS = 8
"""Length of the sequence that the model is probed with."""

NOT_AS_EXPECTED = (IndexError, TypeError, ValueError)
"""What a model raises that cannot take apart or use what stands for the output of a block."""

RunBlock = Callable[[int, BlockForward, BlockCall, Tensor], Any]
"""What stands in for a block: ``run(index, forward, call, hidden_BLH)`` gives the block's output."""


class _NothingMadeUp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the context, computing with a tensor without content is an error. Products of a matrix with content and
    one on the meta device (mm, addmm, convolution; torch 2.13) are memory that nobody has set otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if len({tensor.is_meta for tensor in tensors}) == 2:
            raise RuntimeError(f"{func} of a tensor on the meta device and of others")
        return func(*args, **(kwargs or {}))


_Found = TypeVar("_Found")


class _Beside:
    """Stands for what a block returns beside its hidden states, which nobody has computed."""


class _Reached(Exception):
    """The forward pass has come as far as it was needed."""


class Skeleton:
    """A causal language model without its weights.

    Attributes:
        net: The transformers model; block parameters are on the meta device unless attached.
        experts: The experts of blocks that have some, by their name in ``net``.
        block_names: Names of the decoder blocks in order, for example ``model.layers.0``.
        names: Checkpoint name of each parameter and persistent buffer that the checkpoint holds, by its name in
            ``net``; filled by ``bind``.
        extra_names: Checkpoint tensors that ``net`` has no use for.
        tables: Large ones outside the blocks, which stay in the dtype that they are stored in.
        carried_size: Numbers of each token that go from block to block beside its hidden state, as arguments of blocks
            depend on the tokens (Gemma 4's embeddings for each layer); filled by ``find_carried``.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Build the skeleton from ``folder/config.json``.

        Raises:
            UnsupportedArchitectureError: when transformers has no class for it, no decoder blocks are found, or its
                experts cannot be split.
        """
        self.device, self.dtype = device, dtype
        self.net = _meta_model(folder, dtype)
        self.experts = split_experts(self.net)
        self.block_names = _find_blocks(self.net)
        self.names: dict[str, str] = {}
        self.extra_names: tuple[str, ...] = ()
        self.tables = Tables(self.net, tuple(name + "." for name in self.block_names), dtype)
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}
        self._returns_tuples: set[bool] = set()
        self._beside: dict[int, tuple[_Beside | None, ...]] = {}
        self._carried: list[dict[Place, slice]] = []
        self.carried_size = 0
        self._outer: Mapping[str, Tensor] = {}
        self._embedding: dict[str, str] | None = None
        self._is_rest_zero = True
        self._move_buffers()

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.block_names)

    @property
    def architecture(self) -> str:
        """Name of the transformers class."""
        return type(self.net).__name__

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        size: int = self.net.config.get_text_config().hidden_size
        return size

    def block(self, index: int) -> nn.Module:
        """Return the module of one decoder block."""
        block: nn.Module = self.net.get_submodule(self.block_names[index])
        return block

    def fused_parts(self, shapes: Shapes) -> dict[str, tuple[str, ...]]:
        """Return which checkpoint tensors hold all experts of a block; see ``checkpoint.fused_parts``."""
        return fused_parts(self.net, self.experts, shapes)

    def bind(self, shapes: Shapes) -> None:
        """Match checkpoint tensors (name to shape) with the model's parameters and persistent buffers.

        A shape of None is not compared: the tensor is packed, and its format knows.

        Raises:
            UnsupportedArchitectureError: when tensors would be converted while loading.
            CorruptWeightsError: when a parameter is in no tensor, or has another shape.
        """
        stacked = stack_parts(self.net, shapes)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.net.state_dict().items()}
        others = [name for name in shapes if name not in stacked]
        renamed = {**checkpoint_names(self.net, others, self.experts), **stacked}
        self.names = {model_name: name for name, model_name in renamed.items() if model_name in wanted}
        self.extra_names = tuple(name for name, model_name in renamed.items() if model_name not in wanted)
        tied = self._tied_names()
        for model_name, shape in wanted.items():
            name = self.names.get(model_name)
            if name is None and model_name not in tied:
                raise CorruptWeightsError(
                    f"the checkpoint has no tensor for {model_name} of {self.architecture}",
                    code="source.missing_tensor",
                    hint="the upload is incomplete, or config.json belongs to another model",
                )
            stored = shapes[name] if name is not None else None
            if stored is not None and stored != shape:
                raise CorruptWeightsError(
                    f"{name} has the shape {list(stored)}, but {self.architecture} as configured needs {list(shape)}",
                    code="source.shape",
                    hint="config.json and the weights belong to different models",
                )

    def block_tensors(self, index: int) -> dict[str, str]:
        """Return checkpoint names by the names local to one block, for example ``mlp.up_proj.weight``."""
        prefix = self.block_names[index] + "."
        return {model[len(prefix) :]: name for model, name in self.names.items() if model.startswith(prefix)}

    def outer_tensors(self) -> dict[str, str]:
        """Return checkpoint names by model name for everything outside the blocks."""
        prefixes = tuple(name + "." for name in self.block_names)
        return {model: name for model, name in self.names.items() if not model.startswith(prefixes)}

    def embedding_tensors(self) -> dict[str, str]:
        """Return checkpoint names by model name for what is read outside the blocks before the last one is called:
        what `embed` needs, and no more than that where it is certain (found once; independent of weights)."""
        if self._embedding is None:
            read = self._read_before_blocks()
            tied = self._tied_names()
            needed = {name if name in self.names else tied[name] for name in read}
            self._embedding = {model: name for model, name in self.outer_tensors().items() if model in needed}
        return self._embedding

    @contextmanager
    def attached(
        self, index: int, weights: Mapping[str, Tensor], precision: Precision = Precision.FLOAT32
    ) -> Iterator[nn.Module]:
        """Yield one block with ``weights`` (by local name) in place; its parameters are meta again afterwards. Its
        matrix products are made in ``precision`` meanwhile."""
        block = self.block(index)
        before = dict(block.named_parameters()) | dict(block.named_buffers())
        for name, tensor in self.dense(index, dict(weights), precision).items():
            set_tensor(block, name, tensor)
        try:
            with products(precision):
                yield block
        finally:
            for name in weights:
                set_tensor(block, name, before[name].detach().to("meta"))

    @contextmanager
    def replaced(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context, some weights of an attached block (by local name) are others, as ``dense`` gives them."""
        block = self.block(index)
        before = {name: block.get_parameter(name) for name in weights}
        for name, tensor in weights.items():
            set_tensor(block, name, tensor)
        try:
            yield
        finally:
            for name, tensor in before.items():
                set_tensor(block, name, tensor)

    def inputs_taken_through(self, functions: Mapping[str, InputFunction]) -> AbstractContextManager[None]:
        """Within the context, linears, by their name in the checkpoint, take their inputs through functions."""
        names = {stored: model for model, stored in self.names.items()}
        own = {names[f"{name}.weight"].removesuffix(".weight"): function for name, function in functions.items()}
        return taken_through(self.net, own)

    def dense(
        self, index: int, weights: dict[str, Tensor], precision: Precision = Precision.FLOAT32
    ) -> dict[str, Tensor]:
        """Return a block's weights as the model computes with them, those of linears in ``precision``. ``weights`` is
        used up: no tensor is in memory twice."""
        block = self.block(index)

        def converted(name: str) -> Tensor:
            owner, _, leaf = name.rpartition(".")
            is_factor = leaf == "weight" and is_linear(block.get_submodule(owner))
            return self._computed_with(weights.pop(name), DTYPES[precision] if is_factor else self.dtype)

        return {name: converted(name) for name in list(weights)}

    def attach_outer(self, weights: Mapping[str, Tensor], *, is_rest_zero: bool = True) -> None:
        """Put ``weights`` (by model name) in place outside the blocks; what is missing becomes zero-stride zeros, or
        goes to the meta device, where reading it is an error."""
        prefixes = tuple(name + "." for name in self.block_names)
        state = self.net.state_dict()
        tied = {name: weights[origin] for name, origin in self._tied_names().items() if origin in weights}
        found = {**tied, **weights}
        large = self.tables.among(found)
        # What stands under two names, as tied embeddings do, is in memory once.
        placed: dict[int, Tensor] = {}

        def place(tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
            if id(tensor) not in placed:
                placed[id(tensor)] = convert(tensor)
            return placed[id(tensor)]

        self.tables.held = {name: place(tensor, lambda t: t.to(self.device)) for name, tensor in large.items()}
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        for name, before in state.items():
            if not name.startswith(prefixes):
                is_placed = name in found and name not in large
                tensor = place(found[name], self._computed_with) if is_placed else zero.expand(before.shape)
                self._assign(self.net, {name: tensor})
        if not is_rest_zero:
            self._lose(name for name in self._outer_names(state) if name not in found)
        self._outer, self._is_rest_zero = weights, is_rest_zero

    @contextmanager
    def embedding_attached(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context, ``weights`` are in place for `embed`, those of ``embedding_tensors``: hidden states
        follow from them alone, since nothing else outside the blocks has any content."""
        self.attach_outer(weights, is_rest_zero=False)
        try:
            yield
        finally:
            self.detach_outer()

    @contextmanager
    def outer_attached(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context, ``weights`` are in place outside the blocks."""
        self.attach_outer(weights)
        try:
            yield
        finally:
            self.detach_outer()

    def detach_outer(self) -> None:
        """Drop the weights outside the blocks."""
        self.attach_outer({})

    @torch.no_grad()
    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Return the hidden states that enter the first block, [batch, length, hidden], with what is carried beside
        them in further columns. Needs ``attach_outer`` or ``embedding_attached``.

        Raises:
            UnsupportedArchitectureError: when block arguments, or which weights are read, depend on the tokens.
        """
        try:
            with nullcontext() if self._is_rest_zero else _NothingMadeUp():  # type: ignore[no-untyped-call]
                calls, hidden_BLH = self._capture(tokens_BL.to(self.device))
        except (RuntimeError, TypeError) as error:
            if self._is_rest_zero or "meta" not in str(error):
                raise
            raise self._reads_more() from error
        if hidden_BLH.is_meta:
            raise self._reads_more()
        carried = self._carried_of(calls, self.calls(*tokens_BL.shape))
        return torch.cat([hidden_BLH, *(part.to(hidden_BLH.dtype) for part in carried)], -1) if carried else hidden_BLH

    @torch.no_grad()
    def find_carried(self) -> None:
        """Find the arguments of blocks that depend on the tokens: tried without the checkpoint's weights, with numbers
        instead that differ from row to row and take no memory. Those that have a vector for each token are carried
        from block to block beside hidden states.

        Raises:
            UnsupportedArchitectureError: when one is something else.
        """
        generator, tokens_BL = torch.Generator().manual_seed(0), self._some_tokens()
        with self._outer_kept():
            state = self.net.state_dict()
            for name in self._outer_names(state):
                if state[name].is_floating_point():
                    self._assign(self.net, {name: _overlapping_rows(state[name].shape, generator)})
            calls, _ = self._capture(tokens_BL)
        different: list[Tensor] = []
        carried: list[dict[Place, slice]] = []
        start, starts = 0, []
        for index, (seen, known) in enumerate(zip(calls, self.calls(*tokens_BL.shape), strict=True)):
            own, plain, places = seen.leaves(), known.leaves(), dict[Place, slice]()
            for path in dict.fromkeys([*own, *plain]):  # in an order that is the same in every process
                value = own.get(path)
                if is_same(value, plain.get(path)):
                    continue
                if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == tokens_BL.shape):
                    raise self._depends_on_tokens(index)
                number = next((n for n, other in enumerate(different) if is_same(value, other)), len(different))
                if number == len(different):
                    different.append(value)
                    starts.append(start)
                    start += value[0, 0].numel()
                places[path] = slice(starts[number], starts[number] + value[0, 0].numel())
            carried.append(places)
        self._carried, self.carried_size = carried, start

    def _some_tokens(self) -> Tensor:
        """Return ids [1, PROBE_TOKENS] from all over the vocabulary, should it depend on the token what is read."""
        vocabulary: int = self.net.config.get_text_config().vocab_size
        return torch.linspace(0, vocabulary - 1, PROBE_TOKENS, device=self.device).long()[None]

    def _depends_on_tokens(self, index: int) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(
            f"block {index} of {self.architecture} is called with arguments that depend on the tokens, and not with a "
            "vector for each of them, so its blocks cannot be run one at a time",
            hint="this architecture is not supported yet; see docs/reference/architectures.md",
        )

    def _carried_of(self, calls: Sequence[BlockCall], plain: Sequence[BlockCall]) -> list[Tensor]:
        """Return what is carried of a call's arguments, [batch, length, columns] each, in the order of the columns.

        Raises:
            UnsupportedArchitectureError: when others depend on the tokens.
        """
        found: dict[int, Tensor] = {}
        for index, (seen, known) in enumerate(zip(calls, plain, strict=True)):
            own, expected, places = seen.leaves(), known.leaves(), self._carried_by(index)
            if own.keys() != expected.keys():
                raise self._depends_on_tokens(index)
            for path, value in own.items():
                if path in places:
                    found.setdefault(places[path].start, value.flatten(2))
                elif not is_same(value, expected[path]):
                    raise self._depends_on_tokens(index)
        return [found[start] for start in sorted(found)]

    def _carried_by(self, index: int) -> Mapping[Place, slice]:
        return self._carried[index] if self.carried_size else {}

    @torch.no_grad()
    def calls(self, batch: int, length: int) -> list[BlockCall]:
        """Return each block's call for a batch of that shape (cached; independent of weights and tokens)."""
        if (batch, length) not in self._calls:
            with self._outer_kept():
                zeros = torch.zeros(batch, length, dtype=torch.long, device=self.device)
                self._calls[batch, length], _ = self._capture(zeros)
        return self._calls[batch, length]

    @torch.no_grad()
    def calls_after(self, tokens_BL: Tensor, past: Any) -> tuple[list[BlockCall], Tensor]:
        """Return each block's call for tokens that follow what a key-value cache holds, and the hidden states that
        enter the first block, [batch, length, hidden]. Needs ``attach_outer``.

        Args:
            tokens_BL: Token ids [batch, length].
            past: The model's own cache, to which running the calls adds the tokens; None has the model make an empty
                one, which is among the calls' arguments, unless it has none of transformers' classes.
        """
        return self._capture(tokens_BL.to(self.device), past_key_values=past, use_cache=self._takes_cache)

    @cached_property
    def _takes_cache(self) -> bool:
        """Whether blocks are given a key-value cache; what some hand from block to block instead only they know."""
        try:
            calls, _ = self._capture(self._some_tokens(), use_cache=True)
        except (UnsupportedArchitectureError, *NOT_AS_EXPECTED):
            return False
        return cache_among(calls) is not None

    @torch.no_grad()
    def run_block(self, index: int, hidden_BLH: Tensor) -> Tensor:
        """Return the output of one block whose weights are attached, [batch, length, hidden], and what is carried."""
        return self.run_block_with_gradient(index, hidden_BLH)

    def run_block_with_gradient(self, index: int, hidden_BLH: Tensor) -> Tensor:
        """Return what ``run_block`` does, as torch may differentiate it by the hidden states."""
        call = self.calls(*hidden_BLH.shape[:2])[index]
        if not self.carried_size:
            return call.run(self.block(index), hidden_BLH)
        hidden_BLH, carried = hidden_BLH.tensor_split([self.hidden_size], dim=-1)
        own = {path: carried[..., columns] for path, columns in self._carried_by(index).items()}
        return torch.cat([call.replaced(own).run(self.block(index), hidden_BLH), carried], -1)

    @torch.no_grad()
    def logits(self, hidden_BLH: Tensor) -> Tensor:
        """Return float32 logits [batch, length, vocabulary] of final hidden states, whatever is carried beside them.
        Needs ``attach_outer``."""
        return self.logits_with_gradient(hidden_BLH)

    def logits_with_gradient(self, hidden_BLH: Tensor) -> Tensor:
        """Return what ``logits`` does, as torch may differentiate it by the hidden states."""
        zeros = torch.zeros(hidden_BLH.shape[:2], dtype=torch.long, device=self.device)
        if self.carried_size:
            hidden_BLH = hidden_BLH[..., : self.hidden_size]

        def give(index: int, forward: BlockForward, call: BlockCall, hidden: Tensor) -> Tensor:
            return hidden_BLH if index == self.num_blocks - 1 else hidden

        with self.blocks_replaced(give):
            logits: Tensor = self.net(input_ids=zeros, use_cache=False).logits
        return logits.to(torch.float32)

    @contextmanager
    def blocks_replaced(self, run: RunBlock, use_cache: bool = False) -> Iterator[None]:
        """Within the context, ``run`` stands in for every block; a tensor it gives is returned as the model expects it
        with or without a key-value cache."""
        blocks = [self.block(index) for index in range(self.num_blocks)]
        for index, block in enumerate(blocks):
            block.forward = self._replacement(index, block.forward, run, use_cache in self._returns_tuples)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _replacement(self, index: int, original: BlockForward, run: RunBlock, is_tuple: bool) -> BlockForward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            by_name = "hidden_states" in kwargs
            hidden = kwargs.pop("hidden_states") if by_name else args[0]
            call = BlockCall(args if by_name else args[1:], kwargs, by_name)
            output = run(index, original, call, hidden)
            if not (is_tuple and isinstance(output, Tensor)):
                return output
            if index not in self._beside:
                self._beside[index] = self._returned_beside(index, call, hidden)
            return (output, *self._beside[index])

        return forward

    def _returned_beside(self, index: int, call: BlockCall, hidden: Tensor) -> tuple[_Beside | None, ...]:
        """Return what stands for all that a block returns after its hidden states."""
        output = self.tried(index, call, hidden.shape, lambda block, own, x: own.run_raw(block, x))
        return () if isinstance(output, Tensor) else tuple(None if v is None else _Beside() for v in output[1:])

    @torch.no_grad()
    def tried(
        self, index: int, call: BlockCall, shape: Sequence[int], run: Callable[[nn.Module, BlockCall, Tensor], _Found]
    ) -> _Found:
        """Return what ``run`` finds when it runs a copy of a block without its weights, on hidden states of a shape: on
        the meta device, or where the block looks at numbers, with zeros that take no memory.

        Args:
            index: Of the block.
            call: How it is called.
            shape: Of the hidden states.
            run: Gets the block, the call, and hidden states.
        """

        def copied() -> nn.Module:
            block = copy.deepcopy(self.block(index))
            vars(block).pop("forward", None)  # what stands in for the original's
            return block

        moved, before = call.to("meta"), call.places()
        try:
            found = run(copied().to("meta"), moved, torch.empty(*shape, dtype=self.dtype, device="meta"))
        except NotImplementedError:
            block = copied()
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            for name, parameter in block.named_parameters():
                set_tensor(block, name, zero.to(parameter.dtype).expand(parameter.shape))
            moved = call.to(self.device)
            found = run(block, moved, torch.zeros(*shape, dtype=self.dtype, device=self.device))
        if moved.places() != before:
            raise self._hands_on()
        return found

    def _hands_on(self) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(
            f"blocks of {self.architecture} hand on more than hidden states to those after them",
            hint="this architecture is not supported yet; see docs/reference/architectures.md",
        )

    def _capture(
        self, tokens_BL: Tensor, past_key_values: Any = None, use_cache: bool = False
    ) -> tuple[list[BlockCall], Tensor]:
        """Return each block's call and the hidden states that enter the first one."""
        calls: list[BlockCall] = []
        seen: list[Tensor] = []

        def record(index: int, forward: BlockForward, call: BlockCall, hidden: Tensor) -> Tensor:
            calls.append(call)
            seen.append(hidden)
            if index == self.num_blocks - 1 or hidden.dim() != seen[0].dim():
                raise _Reached
            return hidden

        returns_tuples = use_cache in self._returns_tuples
        try:
            with self.blocks_replaced(record, use_cache), suppress(_Reached):
                self.net(input_ids=tokens_BL, past_key_values=past_key_values, use_cache=use_cache)
            is_taken_apart = bool(seen) and seen[-1].dim() != seen[0].dim()
        except NOT_AS_EXPECTED:
            if not seen or returns_tuples:
                raise
            is_taken_apart = True
        if is_taken_apart and not returns_tuples:
            # The model indexed or unpacked our tensor, so it expects its blocks to return tuples.
            self._returns_tuples.add(use_cache)
            if past_key_values is not None:  # what blocks return is found without a cache, which trying would fill
                self.calls(*tokens_BL.shape)
            return self._capture(tokens_BL, past_key_values, use_cache)
        if any(isinstance(leaf, _Beside) for call in calls for leaf in call.leaves().values()):
            raise self._hands_on()
        if seen and seen[0].shape[:-1] != tokens_BL.shape:
            raise UnsupportedArchitectureError(
                f"{self.architecture} makes hidden states {list(seen[0].shape)} of tokens {list(tokens_BL.shape)}, not "
                "one vector for each of them in their order",
                hint="this architecture is not supported yet; see docs/reference/architectures.md",
            )
        if len(calls) != self.num_blocks or seen[-1].shape != seen[0].shape:
            raise UnsupportedArchitectureError(
                f"the forward pass of {self.architecture} does not run its decoder blocks one after the other",
                hint="this architecture is not supported yet; see docs/reference/architectures.md",
            )
        return calls, seen[0]

    def _reads_more(self) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(
            f"{self.architecture} reads more weights before its first block for some tokens than for others",
            hint="this architecture is not supported yet; see docs/reference/architectures.md",
        )

    @contextmanager
    def _outer_kept(self) -> Iterator[None]:
        """Within the context, everything outside the blocks is zeros; afterwards it is what it was."""
        attached, is_rest_zero = self._outer, self._is_rest_zero
        self.detach_outer()
        try:
            yield
        finally:
            self.attach_outer(attached, is_rest_zero=is_rest_zero)

    @torch.no_grad()
    def _read_before_blocks(self) -> list[str]:
        """Return the parameters (by model name) outside the blocks that are read before the last block is called."""
        names = self._outer_names(self.net.state_dict())
        tokens_BL = self._some_tokens()
        with self._outer_kept():
            plain = self._capture(tokens_BL)

            def is_unread(some: Sequence[str]) -> bool:
                self.detach_outer()
                self._lose(some)
                try:
                    with _NothingMadeUp():  # type: ignore[no-untyped-call]
                        return is_same(_plain(*self._capture(tokens_BL)), _plain(*plain))
                except (RuntimeError, TypeError):  # what torch says of a tensor without content
                    return False

            def read_of(some: Sequence[str]) -> list[str]:
                if not some or is_unread(some):
                    return []
                half = len(some) // 2
                return [*read_of(some[:half]), *read_of(some[half:])] if half else list(some)

            read = read_of(names)
            # Whatever was found is used only where it holds for all of them at once.
            return read if is_unread([name for name in names if name not in read]) else names

    def _outer_names(self, state: Iterable[str]) -> list[str]:
        """Return the names among ``state`` that are outside the blocks."""
        prefixes = tuple(name + "." for name in self.block_names)
        return [name for name in state if not name.startswith(prefixes)]

    def _lose(self, names: Iterable[str]) -> None:
        """Parameters and buffers have no content any more: they are on the meta device."""
        state = self.net.state_dict()
        for name in names:
            set_tensor(self.net, name, torch.empty_like(state[name], device="meta"))

    def _tied_names(self) -> dict[str, str]:
        """Return the parameters that another one provides when the checkpoint does not hold them."""
        pairs = list(getattr(self.net, "all_tied_weights_keys", {}).items())
        head, embedding = self.net.get_output_embeddings(), self.net.get_input_embeddings()
        names = {id(module): name for name, module in self.net.named_modules()}
        # Models that hold another one say it in the config of that one only.
        is_tied = getattr(self.net.config.get_text_config(), "tie_word_embeddings", False)
        if is_tied and head is not None and id(head) in names and id(embedding) in names:
            pairs.append((f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"))
        both_ways = [pair for a, b in pairs for pair in ((a, b), (b, a))]
        return {name: other for name, other in both_ways if name not in self.names and other in self.names}

    def _computed_with(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(
            device=self.device, dtype=(dtype or self.dtype) if tensor.is_floating_point() else tensor.dtype
        )

    def _assign(self, owner: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            set_tensor(owner, name, self._computed_with(tensor))

    def _move_buffers(self) -> None:
        for module in self.net.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)


def dense_logits(
    skeleton: Skeleton, sequences: Iterable[Tensor], load: Callable[[int], Mapping[str, Tensor]]
) -> Iterator[Tensor]:
    """Yield float32 logits [batch, length, vocabulary] of each of several token tensors, one block in memory at a time;
    every block is loaded once. Needs ``attach_outer``.

    Args:
        skeleton: The model.
        sequences: Token ids [batch, length] each.
        load: Gives the weights of one block by local name.
    """
    hidden = [skeleton.embed(tokens_BL) for tokens_BL in sequences]
    for index in range(skeleton.num_blocks):
        with skeleton.attached(index, load(index)):
            hidden = [skeleton.run_block(index, states_BLH) for states_BLH in hidden]
    yield from map(skeleton.logits, hidden)


def _meta_model(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model with meta parameters and real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # include_buffers=False: rotary tables and the like are computed by the constructor and kept.
        with init_empty_weights(include_buffers=False):
            net = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, AttributeError, ImportError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedArchitectureError(
            f"transformers cannot build a causal language model from {folder.name}/config.json: {reason}",
            hint="check model_type and architectures in config.json; models that need remote code are refused",
        ) from error
    return net.eval().requires_grad_(False)


def _find_blocks(net: Any) -> tuple[str, ...]:
    """Return the names of the decoder blocks: the module list with ``num_hidden_layers`` entries and most weights, in
    what transformers calls the decoder, beside which may be a vision model as deep as that."""
    depth = getattr(net.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    inside = set(net.get_decoder().modules())
    lists = [(name, m) for name, m in lists if m in inside] or lists
    if not lists:
        raise UnsupportedArchitectureError(
            f"{type(net).__name__} has no list of {depth} decoder blocks",
            hint="only decoder-only language models are converted; see docs/reference/architectures.md",
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{name}.{index}" for index in range(len(blocks)))


def _plain(calls: Iterable[BlockCall], hidden_BLH: Tensor) -> tuple[Any, ...]:
    """Return what was captured as tuples, lists and dicts."""
    return [(call.args, call.kwargs) for call in calls], hidden_BLH


def _overlapping_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return random numbers of a shape, where each row is the one before it shifted by one element."""
    numbers = 0.02 * torch.randn(sum(shape) + 1, generator=generator)
    return numbers.as_strided(tuple(shape), (1,) * len(shape))
