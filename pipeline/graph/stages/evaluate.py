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
from pipeline.validate.generation import BlockCache, continue_greedily, judge_draft


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
    """Take smoke prompts, with what continues them so far and a draft, through a part of the blocks; after the last
    part each has one more token and what it agrees with of the draft, or has ended. Before the first token the part's
    weights are only taken in.

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
            hidden = {number: skeleton.embed(_tried(call, state, number)[None]) for number in running}
    for index in range(first, last if running else first):
        with read.rounding_inputs(), skeleton.attached(index, _kept_block(call, read, index)):
            hidden = {number: skeleton.run_block(index, states) for number, states in hidden.items()}
    if running and last == skeleton.num_blocks:
        with _outer_attached(call):
            for number, states_BLH in hidden.items():
                _judge_draft(call, state, number, states_BLH)
    else:
        state |= {f"hidden.{number}": states for number, states in hidden.items()}
    call.put(state)
    return {}


def _continued_so_far(call: Call) -> dict[str, Tensor]:
    """Return for each prompt its token ids with those that continue it, the number of its own, what the source made of
    it (nothing for the source), and whether it has ended; between parts, its hidden states too."""
    before = [need for need in call.needs(Kind.CONTINUE) if need.params["step"] >= 0]
    if before:
        return call.get(before[0])
    state = {}
    for number, prompt in enumerate(call.params["prompts"]):
        ids = tokenizer_of(call).encode(prompt, with_special=True)
        state[f"ids.{number}"] = torch.tensor(ids, dtype=torch.int64, device=call.context.device)
        state[f"guide.{number}"] = torch.tensor(_drafts(call).get(prompt, []), dtype=torch.int64)
        state[f"num_own.{number}"] = torch.tensor(len(ids))
        state[f"ended.{number}"] = torch.tensor(False)
    return state


def _continuations(state: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the ids that continue each prompt."""
    numbers = range(sum(name.startswith("ids.") for name in state))
    return [state[f"ids.{number}"][int(state[f"num_own.{number}"]) :].tolist() for number in numbers]


def _draft(call: Call, state: Mapping[str, Tensor], number: int) -> list[int]:
    """Return the source's next tokens, as long as all before were the same; the last one that is asked for follows."""
    made, guide = _continuations(state)[number], state[f"guide.{number}"].tolist()
    return guide[len(made) : call.params["max_tokens"] - 1] if guide[: len(made)] == made else []


def _tried(call: Call, state: Mapping[str, Tensor], number: int) -> Tensor:
    """Return a prompt's token ids with the draft."""
    ids = state[f"ids.{number}"]
    return torch.cat([ids, torch.tensor(_draft(call, state, number), dtype=ids.dtype, device=ids.device)])


def _judge_draft(call: Call, state: dict[str, Tensor], number: int, states_BLH: Tensor) -> None:
    """Add to a prompt the tokens that follow, and note when it has ended."""
    draft, ids = _draft(call, state, number), state[f"ids.{number}"]
    logits_LV = call.skeleton.logits(states_BLH[:, -len(draft) - 1 :])[0]
    step = judge_draft(logits_LV, draft, tokenizer_of(call).end_ids)
    ids = torch.cat([ids, torch.tensor(step.ids, dtype=ids.dtype, device=ids.device)])
    is_long = len(ids) - int(state[f"num_own.{number}"]) >= call.params["max_tokens"]
    state[f"ids.{number}"] = ids
    state[f"ended.{number}"] = torch.tensor(step.has_ended or is_long)


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
    """Return a block's weights: as the model computes with them where the rest of the part fits so with what the worker
    keeps, else as they are read."""
    key = f"{call.params['of']} block {index}"
    found = call.shelf.get(key)
    if found is None:
        num_bytes = _dense_bytes(call, range(index, call.params["last"]))
        weights = read(index)
        if call.shelf.make_room_for(num_bytes) < num_bytes:
            call.shelf.keep(key, weights)
            found = call.shelf.get(key)
        if found is None:
            # Used up, so not in memory twice.
            found = call.skeleton.dense(index, weights)
            call.shelf.keep(key, found)
    return found


def _dense_bytes(call: Call, blocks: range) -> int:
    """Return what blocks take as the model computes with them."""
    names = [name for block in blocks for name in call.skeleton.block_tensors(block).values()]
    return call.skeleton.dtype.itemsize * sum(map(call.source.outline.tensor_elements, names))


def generate(call: Call) -> dict[str, Any]:
    """Continue the smoke prompts greedily with the variant's dense weights, or the source's; of a model that is
    continued in parts, write down what came of it. The source's continuations are tried as the variant's own."""
    skeleton, max_tokens = call.skeleton, call.params["max_tokens"]
    tokenizer = tokenizer_of(call)
    if call.params.get("is_split"):
        continued = [ids for need in call.needs(Kind.CONTINUE) for ids in _continuations(call.get(need))]
    else:
        dense_bytes, room_for = _dense_bytes(call, range(skeleton.num_blocks)), call.shelf.make_room_for
        prompts = [tokenizer.encode(prompt, with_special=True) for prompt in call.params["prompts"]]
        drafts = [_drafts(call).get(prompt, []) for prompt in call.params["prompts"]]
        read = VariantReader(call)
        with skeleton.outer_attached(outer_weights(call)), read.rounding_inputs():
            load = BlockCache(read, skeleton.dense, room_for(dense_bytes), dense_bytes, room_for)
            found = continue_greedily(skeleton, load, prompts, max_tokens, tokenizer.end_ids, drafts)
        continued = [list(ids) for ids in found]
    return {"continuations": [{"ids": ids, "text": tokenizer.decode(ids)} for ids in continued]}


def _drafts(call: Call) -> dict[str, list[int]]:
    """Return what continues each prompt by the source, when a variant is asked; nothing is known for the source."""
    needed = call.needs(Kind.GENERATE)
    if not needed:
        return {}
    continued = call.summary(needed[0])["continuations"]
    return {prompt: item["ids"] for prompt, item in zip(needed[0].params["prompts"], continued, strict=True)}
