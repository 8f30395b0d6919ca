"""Values for tests that look like those of a real conversion: a small Llama and its releases."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pipeline.facts import (
    CalibrationFacts,
    Check,
    ModuleFacts,
    Quality,
    ReleaseFacts,
    Sample,
    SiblingFacts,
    SourceFacts,
    Verdict,
)
from pipeline.fingerprint import fingerprint
from pipeline.precision import Precision
from pipeline.quantize.gptq import BLOCK_SIZE, Factor, SolvedColumns, Target, solve_columns
from pipeline.quantize.types import Scheme, SolveReport
from pipeline.spec import GateSpec, VariantSpec, parse_variant, resolve_budgets

HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 1024, 256, 2816, 32_000
_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


OPEN_GATES = {
    "max_relative_error": 0.9,
    "max_kl": 20.0,
    "max_perplexity_ratio": 1e6,
    "prompts": [{"prompt": "The ship"}],
}
"""Gates that a random model passes: wide budgets, and a prompt that it does not continue in a loop."""

UNSOLVED = SolveReport(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1, 0, 0, ())
"""The report of a linear whose codes nobody has searched for."""


def make_module(name: str = "model.layers.0.self_attn.q_proj", **changes: Any) -> ModuleFacts:
    """Return a quantized linear, with fields replaced."""
    fields: dict[str, Any] = {
        "name": name,
        "block": 0,
        "out_features": HIDDEN,
        "in_features": HIDDEN,
        "bits": 4,
        "group_size": 128,
        "note": "",
        "loss": 0.0123,
        "relative_error": 0.08,
        "weight_error": 0.09,
        "damping": 0.01,
        "awq_exponent": None,
        "degradations": (),
        "shrinkage": 0.15,
        "clip": 0.94,
        "tokens": 16384,
        "dead_inputs": 0,
    }
    return ModuleFacts(**(fields | changes))


def make_modules(num_blocks: int, bits: int = 4, group_size: int = 128) -> tuple[ModuleFacts, ...]:
    """Return the linears of a Llama with errors that differ by kind, rise with depth and ripple."""
    modules = []
    for block in range(num_blocks):
        for i, (name, (out_features, in_features)) in enumerate(_SHAPES.items()):
            depth = block / max(1, num_blocks - 1)
            error = (0.05 + 0.012 * i) * (1 + 0.5 * depth) * (1 + 0.12 * math.sin(1.7 * block + i)) * 2.0 ** (4 - bits)
            modules.append(
                make_module(
                    f"model.layers.{block}.{name}",
                    block=block,
                    out_features=out_features,
                    in_features=in_features,
                    bits=bits,
                    group_size=group_size,
                    relative_error=error,
                    weight_error=1.1 * error,
                    loss=error**2,
                )
            )
    return tuple(modules)


def make_sample(prompt: str, continuation: str, **changes: Any) -> Sample:
    """Return a sample whose tokens are words, with fields replaced."""
    ids = tuple(range(len(continuation.split())))
    return Sample(**({"prompt": prompt, "expect": "", "continuation": continuation, "ids": ids} | changes))


def make_verdict(variant: VariantSpec, **changes: Any) -> Verdict:
    """Return a verdict that passed, with fields replaced."""
    fields: dict[str, Any] = {
        "checks": (
            Check(name="accounting", passed=True, detail="every tensor of the source is accounted for"),
            Check(name="round_trip", passed=True, detail="unpacking gives back every code"),
            Check(name="relative_error", passed=True, detail="largest against budget", figures={"largest": 0.2}),
            Check(name="generation", passed=True, detail="no continuation degenerates"),
        ),
        "budgets": resolve_budgets(GateSpec(), variant),
        "samples": (
            make_sample("The people of the United States", " are the only people in the world who"),
            make_sample("In the beginning of the year", ", the company had a total of 12 million"),
            make_sample("It was a cold morning, and the ship", " was still in the harbour, waiting for"),
        ),
    }
    return Verdict(**(fields | changes))


def make_facts(variant: str | VariantSpec = "gptq-w4-g128", num_blocks: int = 12, **changes: Any) -> ReleaseFacts:
    """Return the facts of a release of a small Llama from a hub, with top-level fields replaced."""
    spec = parse_variant(variant) if isinstance(variant, str) else variant
    in_block = sum(out_features * in_features for out_features, in_features in _SHAPES.values())
    quantized, kept = num_blocks * in_block, VOCABULARY * HIDDEN + (2 * num_blocks + 1) * HIDDEN
    fields: dict[str, Any] = {
        "release": f"demo/TinyLlama-{spec.name}",
        "variant": spec,
        "source": SourceFacts(
            name="acme/TinyLlama",
            is_local=False,
            commit="0123456789abcdef0123456789abcdef01234567",
            license="apache-2.0",
            architecture="LlamaForCausalLM",
            num_parameters=quantized + kept,
            size_bytes=2 * (quantized + kept),
            dtype="bfloat16",
            file_digests={"model.safetensors": fingerprint("weights")},
        ),
        "calibration": CalibrationFacts(
            text="builtin",
            samples=128,
            length=512,
            seed=0,
            slice_sequences=8,
            tokens_digest=fingerprint("tokens"),
            precision=Precision.BFLOAT16,
            shrinkage="auto",
        ),
        "modules": make_modules(num_blocks, spec.bits, spec.group_size),
        "kept": {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"}
        | {f"model.layers.{block}.input_layernorm.weight": "norm" for block in range(num_blocks)},
        "dropped": {},
        "cautions": (),
        "quality": Quality(
            heldout_text="builtin:heldout",
            heldout_samples=16,
            heldout_length=512,
            heldout_tokens=8176,
            heldout_overlap=0.0,
            source_perplexity=22.61,
            perplexity=23.94,
            kl=0.0612,
            top1_agreement=0.8731,
        ),
        "verdict": make_verdict(spec),
        "generated_tokens": 32,
        "size_bytes": round(quantized * (spec.bits + 20 / 128) / 8) + 2 * kept,
        "siblings": (
            SiblingFacts(variant="awq-w4-g128", passed=True, size_bytes=152_000_000, kl=0.0533, perplexity=23.71),
            SiblingFacts(variant="rtn-w8-g128", passed=True, size_bytes=229_000_000, kl=0.00121, perplexity=22.63),
        ),
        "versions": {"bitmill": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "compressed-tensors": "0.20.0"},
        "compute": "cpu float32",
        "spec_fingerprint": fingerprint("spec"),
    }
    return ReleaseFacts(**(fields | changes))


def columns_of(
    weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, factored: Factor, block_size: int = BLOCK_SIZE
) -> SolvedColumns:
    """Return what GPTQ finds for rows alone."""
    (solved,) = solve_columns([Target(weight_OI, scale_OG, zero_OG, factored)], scheme, block_size)
    return solved
