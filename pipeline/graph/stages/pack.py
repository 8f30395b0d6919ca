"""From codes to the tensors of a release, each read back from its file and proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.formats.codec import codec_for, prove_round_trip
from pipeline.graph.dag import Kind
from pipeline.graph.folds import fold_block
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.solve import scale_results
from pipeline.graph.stages.solved import SolvedLinear, solved_linears, solved_stacks
from pipeline.spec import Format
from pipeline.tensors.local import copy_problems, read_file_index, read_file_tensors
from pipeline.validate.dense import scale_problems


def pack(call: Call) -> dict[str, Any]:
    """Write one block's tensors in the variant's format.

    The file is read back: quantized linears must unpack to exactly the solver's codes, scales and zero points, copied
    tensors must be the source's bit for bit. What is not is listed for the gates.
    """
    codec, index = codec_for(Format(call.params["format"])), call.unit.block
    names = call.skeleton.block_tensors(index)
    weights = call.source.block(index)
    scale_dtype = _scale_dtype(weights)
    folded = fold_block(weights, scale_results(call).values())
    solved = {own.linear.name: own for parts in solved_stacks(call) for own in solved_linears(call, parts)}
    quantized = {name: own.quantized for name, own in solved.items()}
    exponents = {need.params["group"]: call.summary(need)["exponent"] for need in call.needs(Kind.SCALES)}
    kept = {name: local for local, name in names.items() if name.removesuffix(".weight") not in quantized}
    copied = {name: weights[local] for name, local in kept.items() if folded[local] is weights[local]}
    call.put({name: folded[local].to(weights[local].dtype) for name, local in kept.items()})
    for name, linear in quantized.items():
        call.put(codec.pack(name, linear, scale_dtype))
    path = call.write()
    back = read_file_tensors(path)
    problems, bad_scales = copy_problems(path, copied), []
    num_proven = 0
    for name, linear in quantized.items():
        try:
            prove_round_trip(codec, name, linear, back)
            bad_scales.extend(scale_problems(name, codec.unpack(name, back, linear.scheme)[1]))
            num_proven += 1
        except FormatError as error:
            problems.append(error.message)
    return {
        **_contents(path),
        "num_proven": num_proven,
        "problems": problems,
        "scale_problems": bad_scales,
        "folded": sorted(kept.keys() - copied.keys()),
        "reports": {
            name: {**_report(own), "awq_exponent": exponents.get(own.position)} for name, own in solved.items()
        },
    }


def _report(solved: SolvedLinear) -> dict[str, Any]:
    routed = {} if solved.expert_tokens is None else {"expert_tokens": solved.expert_tokens}
    return {**asdict(solved.quantized.report), **routed}


def outer(call: Call) -> dict[str, Any]:
    """Write everything outside the blocks as it is in the source: embeddings, final norm, output head, extras.

    The file is read back and compared with the source bit for bit.
    """
    skeleton = call.skeleton
    names = dict.fromkeys([*skeleton.outer_tensors().values(), *skeleton.extra_names])
    tensors = call.source.read({name: name for name in names})
    call.put(tensors)
    path = call.write()
    return {**_contents(path), "problems": copy_problems(path, tensors)}


def _contents(path: Path) -> dict[str, Any]:
    index = read_file_index(path)
    return {"tensors": sorted(index.entries), "bytes": index.total_bytes}


def _scale_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that compressed-tensors scales are stored in: the source's own 16-bit dtype."""
    kinds = {tensor.dtype for tensor in weights.values()}
    return torch.bfloat16 if torch.bfloat16 in kinds else torch.float16
