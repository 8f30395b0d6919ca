"""What a variant makes of held-out text and of the smoke prompts, from its packed files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.graph.dag import Kind
from pipeline.graph.stages.calibrate import slice_states
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.variant import VariantReader
from pipeline.precision import Precision
from pipeline.skeleton.products import products
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.validate.divergence import add_up, compare_predictions
from pipeline.validate.generation import BlockCache, continue_greedily


def outer_weights(call: Call) -> dict[str, Tensor]:
    """Return what lies outside the blocks by model name: as the release holds it, or of the source when there is no
    release."""
    written = call.needs(Kind.OUTER)
    if not written:
        return call.source.outer()
    tensors = call.get(written[0])
    return {model: tensors[name] for model, name in call.skeleton.outer_tensors().items()}


def score(call: Call) -> dict[str, Any]:
    """Compare the variant's predictions with the source's over one slice of held-out tokens.

    What lies outside the blocks is the release's for both: it was proven to be the source's when it was written.
    """
    skeleton, tokens_NL, number = call.skeleton, call.tokens(), call.params["slice"]
    source_NLH, variant_NLH = (slice_states(call, need, [number])[number] for need in call.needs(Kind.FORWARD))
    vocabulary_size = call.source.outline.vocabulary_size
    with skeleton.outer_attached(outer_weights(call)), products(Precision(call.params["precision"])):
        parts = [
            compare_predictions(lambda hidden_LH: skeleton.logits(hidden_LH[None])[0], *row, vocabulary_size)
            for row in zip(source_NLH, variant_NLH, tokens_NL, strict=True)
        ]
    return {"divergence": add_up(parts).as_dict()}


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, commit: str) -> TextTokenizer:
    return TextTokenizer(folder)


def tokenizer_of(call: Call) -> TextTokenizer:
    """Return the source's tokenizer, which is kept: loading it takes longer than a token does."""
    return _tokenizer(call.source.folder, call.context.source_commit)


def continue_part(call: Call) -> dict[str, Any]:
    """Take smoke prompts, with what continues them so far, through a part of the blocks; after the last part each has
    one more token, or has ended. Before the first token the part's weights are only taken in.

    No keys and values are kept: prompts are short, and so what is passed on does not depend on the parts.
    """
    skeleton, first, last = call.skeleton, call.params["first"], call.params["last"]
    read = VariantReader(call)
    if call.params["step"] < 0:
        for index in range(first, last):
            _kept_block(call, read, index)
        return {}
    state = _continued_so_far(call)
    running = [number for number in range(len(call.params["prompts"])) if not state[f"ended.{number}"]]
    hidden = {number: state.pop(f"hidden.{number}") for number in running if first}
    if running and not first:
        with _outer_attached(call):
            hidden = {number: skeleton.embed(state[f"ids.{number}"][None]) for number in running}
    for index in range(first, last if running else first):
        with skeleton.attached(index, _kept_block(call, read, index)):
            hidden = {number: skeleton.run_block(index, states) for number, states in hidden.items()}
    if running and last == skeleton.num_blocks:
        with _outer_attached(call):
            tokens = {number: int(skeleton.logits(states)[0, -1].argmax()) for number, states in hidden.items()}
        _append_tokens(call, state, tokens)
    else:
        state |= {f"hidden.{number}": states for number, states in hidden.items()}
    call.put(state)
    return {}


def _continued_so_far(call: Call) -> dict[str, Tensor]:
    """Return for each prompt its token ids with those that continue it, the number of its own, and whether it has
    ended; between parts, its hidden states too."""
    before = [need for need in call.needs(Kind.CONTINUE) if need.params["step"] >= 0]
    if before:
        return call.get(before[0])
    state = {}
    for number, prompt in enumerate(call.params["prompts"]):
        ids = tokenizer_of(call).encode(prompt, with_special=True)
        state[f"ids.{number}"] = torch.tensor(ids, dtype=torch.int64, device=call.context.device)
        state[f"num_own.{number}"] = torch.tensor(len(ids))
        state[f"ended.{number}"] = torch.tensor(False)
    return state


def _continuations(state: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the ids that continue each prompt."""
    numbers = range(sum(name.startswith("ids.") for name in state))
    return [state[f"ids.{number}"][int(state[f"num_own.{number}"]) :].tolist() for number in numbers]


def _append_tokens(call: Call, state: dict[str, Tensor], tokens: Mapping[int, int]) -> None:
    """Add to each prompt the token that follows, or note that it has ended."""
    for number, token in tokens.items():
        if token in tokenizer_of(call).end_ids:
            state[f"ended.{number}"] = torch.tensor(True)
        else:
            ids = state[f"ids.{number}"]
            state[f"ids.{number}"] = torch.cat([ids, torch.tensor([token], device=ids.device)])


def _outer_attached(call: Call) -> AbstractContextManager[None]:
    """Within the context, the weights outside the blocks are in place."""
    return call.skeleton.outer_attached(_kept(call, "outer", lambda: outer_weights(call)))


def _kept(call: Call, name: str, read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return weights that the worker has from an earlier token as long as there was room, else what ``read`` gives."""
    key = f"{call.params['of']} {name}"
    found = call.shelf.get(key)
    if found is None:
        found = read()
        call.shelf.keep(key, found)
    return found


def _kept_block(call: Call, read: VariantReader, index: int) -> Mapping[str, Tensor]:
    """Return a block's weights as the model computes with them."""
    return _kept(call, f"block {index}", lambda: call.skeleton.dense(index, read(index)))


def generate(call: Call) -> dict[str, Any]:
    """Continue the smoke prompts greedily with the variant's dense weights, or the source's; of a model that is
    continued in parts, write down what came of it."""
    skeleton = call.skeleton
    tokenizer = tokenizer_of(call)
    if call.params.get("is_split"):
        continued = [ids for need in call.needs(Kind.CONTINUE) for ids in _continuations(call.get(need))]
        return {"continuations": [{"ids": ids, "text": tokenizer.decode(ids)} for ids in continued]}
    num_bytes = call.source.outline.index.num_parameters * skeleton.dtype.itemsize
    found = []
    with skeleton.outer_attached(outer_weights(call)):
        room_for = call.shelf.make_room_for
        load = BlockCache(VariantReader(call), skeleton.dense, room_for(num_bytes), room_for)
        for prompt in call.params["prompts"]:
            prompt_ids = tokenizer.encode(prompt, with_special=True)
            ids = continue_greedily(skeleton, load, prompt_ids, call.params["max_tokens"], tokenizer.end_ids)
            found.append({"ids": list(ids), "text": tokenizer.decode(list(ids))})
    return {"continuations": found}
