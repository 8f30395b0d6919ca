"""What a variant makes of held-out text and of the smoke prompts, from its packed files."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.graph.dag import Kind
from pipeline.graph.stages.calibrate import slice_states
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.variant import VariantReader
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.validate.divergence import Divergence, add_up, compare_logits
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
    """Compare the variant's predictions with the source's over one slice of held-out tokens."""
    skeleton, tokens_NL, number = call.skeleton, call.tokens(), call.params["slice"]
    source_NLH, variant_NLH = (slice_states(call, need, [number])[number] for need in call.needs(Kind.FORWARD))
    source_outer, variant_outer = call.source.outer(), outer_weights(call)
    parts: list[Divergence] = []
    for row in range(tokens_NL.shape[0]):
        skeleton.attach_outer(source_outer)
        source_LV = skeleton.logits(source_NLH[row : row + 1])[0]
        skeleton.attach_outer(variant_outer)
        parts.append(compare_logits(source_LV, skeleton.logits(variant_NLH[row : row + 1])[0], tokens_NL[row]))
    skeleton.detach_outer()
    return {"divergence": add_up(parts).as_dict()}


def generate(call: Call) -> dict[str, Any]:
    """Continue the smoke prompts greedily with the variant's dense weights, or the source's."""
    skeleton = call.skeleton
    tokenizer = TextTokenizer(call.source.folder)
    load = BlockCache(VariantReader(call), skeleton.dtype, call.context.shelf_bytes)
    skeleton.attach_outer(outer_weights(call))
    found = []
    for prompt in call.params["prompts"]:
        prompt_ids = tokenizer.encode(prompt, with_special=True)
        ids = continue_greedily(skeleton, load, prompt_ids, call.params["max_tokens"], tokenizer.end_ids)
        found.append({"ids": list(ids), "text": tokenizer.decode(list(ids))})
    skeleton.detach_outer()
    return {"continuations": found}
