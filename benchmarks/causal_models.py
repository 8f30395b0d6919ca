"""Which causal language models of the installed transformers can be converted, tried one by one.

Every class that ``AutoModelForCausalLM`` knows gets a tiny random instance of its own config, a plan, a conversion, and
a comparison: transformers' own model computes with the published tensors, unpacked, and its logits may differ from the
source's by the error that the report states. Each model type has a process of its own and a time limit, so that one
that crashes or hangs costs the others nothing; processes are forked from one that has imported everything.

A model passes, or is refused by the plan with a reason, or fails; a failure that the plan did not foresee is a fault of
Bitmill. What transformers itself cannot make, save and load again is set apart, as nothing is said of it.
From the repository root: ``.venv/bin/python -m benchmarks.causal_models [--only llama,qwen3] [--plan] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

VARIANT = "rtn-w8-g32-gptq"
"""Fine enough that wrong numbers show, in the format that holds every layout of linears."""
GENEROUS = {
    "max_relative_error": None,
    "max_kl": None,
    "max_perplexity_ratio": None,
    "max_degradations": None,
    "heldout_samples": 2,
    "heldout_length": 32,
    "generated_tokens": 8,
    "prompts": [{"prompt": "It was a cold morning"}],
}
"""Gates of random models: they only have to be passable, as what is judged here is whether numbers are right."""

ERROR_FACTOR = 3.0
"""Logit error that is allowed over what the linears' stated relative errors amount to."""

LEAST_ERROR = 1e-5
"""What is below is float32's own; where nothing is off by more than this, a release was compared with its source."""

ROUTED_SHARE = 0.1
"""Share of tokens of a mixture of experts that may be far off: rounding sends a token near a router's boundary to
another expert, and all that follows is another function. The others are judged like those of any model."""

NUM_BLOCKS = 2
LONGEST_BLOCKS = 8
"""Blocks of an instance whose blocks are of several kinds, at most."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 128),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "emb_dim", "hidden_size_per_layer_input"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 256),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "mlp_hidden_size"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 128),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), NUM_BLOCKS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), NUM_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "vocab_size_per_layer_input": 4096,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "rotary_dim": 16,
    "sliding_window": 16,
}
"""Sizes of an instance by the names that configs have for them, as far as a config has these."""

PRELOADED = [
    "pipeline.graph.convert",
    "pipeline.graph.plan",
    "pipeline.publish.plots",
    "tests.architectures",
    "transformers.models.llama.modeling_llama",
]
"""What every process needs, none of which computes anything while it is imported."""

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

OWN_SIZES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": DEFAULT_ROPE, "full_attention": DEFAULT_ROPE},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 256},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_compress_ratio": 2,
        "indexer_budget": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [64, 64], "axial_pos_shape": [8, 64]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 256, "attention_head_dim": 64},
    "zaya": {"num_experts_per_tok": 1},
}
"""What an instance of one model type needs besides, by the names of its config."""

TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 0}


class Ending(StrEnum):
    """What became of a model type."""

    PASSED = "passed"
    PLANNED = "planned"
    REFUSED = "refused by plan"
    FAILED = "failed"
    UNTRIED = "transformers cannot make it"


@dataclass(frozen=True)
class Tried:
    """One model type.

    Attributes:
        model_type: As in config.json.
        ending: What became of it.
        reason: Why it did not pass; empty when it did.
        error: Relative error of the logits.
        stated: Root of the sum of squares of the linears' relative errors; where the model makes more of errors than
            that, what random ones of their size do.
    """

    model_type: str
    ending: Ending
    reason: str = ""
    error: float = 0.0
    stated: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, with commas between them; default: all")
    parser.add_argument("--processes", type=int, default=2, help="default 2")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one model type, default 180")
    parser.add_argument("--plan", action="store_true", help="only make each and plan, which takes a few seconds")
    parser.add_argument("--json", type=Path, dest="json_file", help="also write the table to this file")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(_model_types())
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(args.processes) as pool:
        tried = []
        for own in pool.map(lambda name: _in_own_process(processes, name, args.timeout, args.plan), names):
            tried.append(own)
            print(_line(own), flush=True)
    counts = Counter(own.ending for own in tried)
    judged = len(tried) - counts[Ending.UNTRIED]
    right = counts[Ending.PLANNED if args.plan else Ending.PASSED]
    print(f"\n{', '.join(f'{number} {ending}' for ending, number in counts.most_common())}")
    print(f"{right} of {judged} that transformers can make {'can be planned' if args.plan else 'pass'}", end="")
    print(f": {right / judged:.0%}" if judged else "")
    if args.json_file:
        args.json_file.write_text(json.dumps([asdict(own) for own in tried], indent=1) + "\n", encoding="utf-8")


def _line(own: Tried) -> str:
    figures = f"logits {own.error:.1e}, stated {own.stated:.1e}" if own.stated else ""
    return f"{own.model_type:28} {own.ending:16} {own.reason or figures}"


def _model_types() -> Iterator[str]:
    """Yield one model type for each causal language model class of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    seen: set[str] = set()
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if class_name not in seen:
            seen.add(class_name)
            yield model_type


def _in_own_process(processes: ForkServerContext, model_type: str, timeout_s: float, is_planned_only: bool) -> Tried:
    with tempfile.TemporaryDirectory(prefix="bitmill-causal-models-") as name:
        folder = Path(name)
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=_send, args=(sender, model_type, folder, is_planned_only))
        process.start()
        sender.close()
        try:
            if not receiver.poll(timeout_s):
                return Tried(model_type, Ending.FAILED, f"took longer than {timeout_s:.0f} s")
            return receiver.recv()
        except EOFError:
            process.join()
            last = (folder / "output").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            return Tried(model_type, Ending.FAILED, f"ended with {process.exitcode}: {''.join(last)[:200]}")
        finally:
            process.kill()
            process.join()


def _send(sender: Connection, model_type: str, folder: Path, is_planned_only: bool) -> None:
    """Try one model type in this process, with what it prints in a file."""
    with (folder / "output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sender.send(_try(model_type, folder, is_planned_only))


def _try(model_type: str, folder: Path, is_planned_only: bool) -> Tried:
    """Return what becomes of one model type."""
    from pipeline.errors import PipelineError
    from pipeline.graph.convert import RunOptions, convert
    from pipeline.graph.plan import plan_conversion
    from pipeline.settings import load_settings
    from pipeline.spec import build_spec

    source = folder / "source"
    try:
        expected, has_routers = _make(model_type, source)
    except Exception as error:  # whatever a class of transformers raises on an instance of its own config
        return Tried(model_type, Ending.UNTRIED, _said(error))
    spec = build_spec(
        {
            "source": str(source),
            "variants": [VARIANT],
            "targets": [str(folder / "out")],
            "gates": GENEROUS,
            "calibration": {"samples": 8, "length": 32},
        },
        "causal models",
    )
    settings = load_settings()
    try:
        plan_conversion(spec, settings, 1)
    except PipelineError as error:
        return Tried(model_type, Ending.REFUSED, _said(error))
    except Exception as error:  # the point is to find what is not one of ours
        return Tried(model_type, Ending.FAILED, f"plan: {_said(error)}")
    if is_planned_only:
        return Tried(model_type, Ending.PLANNED)
    try:
        (outcome,) = convert(spec, settings, RunOptions(folder / "work", workers=1, inline=True), _Silent())
    except Exception as error:  # as above
        return Tried(model_type, Ending.FAILED, f"convert: {_said(error)}")
    if not outcome.locations:
        return Tried(model_type, Ending.FAILED, f"gates: {_failed_gates(outcome)}")
    stated = math.sqrt(sum(module.relative_error**2 for module in outcome.facts.modules))
    try:
        found = _published_logits(Path(outcome.locations[0]), source, folder / "dense")
    except Exception as error:
        return Tried(model_type, Ending.FAILED, f"published: {_said(error)}")
    share = ROUTED_SHARE if has_routers else 0.0
    wrong = _error(found, expected, share)
    if wrong >= ERROR_FACTOR * stated:
        stated = max(stated, _error(_disturbed_logits(source, outcome), expected, share))
    is_right = LEAST_ERROR < wrong < ERROR_FACTOR * stated
    reason = "" if is_right else f"logits are off by {wrong:.2e}, stated is {stated:.2e}"
    return Tried(model_type, Ending.PASSED if is_right else Ending.FAILED, reason, wrong, stated)


class _Silent:
    def emit(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _failed_gates(outcome: Any) -> str:
    return "; ".join(f"{gate.name}: {gate.detail}" for gate in outcome.facts.verdict.gates if not gate.passed)[:200]


def _make(model_type: str, folder: Path) -> tuple[Any, bool]:
    """Write a random instance, and return its logits, read back, and whether tokens are routed in it."""
    import transformers as t

    from tests.architectures import save_instance

    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    config = tiny_config(t.CONFIG_MAPPING[model_type]())
    save_instance(config, folder)
    is_routed = "expert" in (folder / "config.json").read_text(encoding="utf-8")
    return _logits(t.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")), is_routed


def tiny_config(config: Any) -> Any:
    """Return a config of the same class with ``SIZES``, and the same of what it holds."""
    return type(config)(**_tiny_values(config))


def _tiny_values(config: Any) -> dict[str, Any]:
    own = config.to_dict()
    values = {name: size for name, size in SIZES.items() if type(own.get(name)) is int}
    values |= {name: number for name, number in TOKEN_IDS.items() if name in own}
    if "head_dim" in own and own["head_dim"] is None:
        values["head_dim"] = SIZES["head_dim"]  # what follows from the others; some compute with it before it does
    if own.get("num_key_value_heads") == own.get("num_attention_heads") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if isinstance(own.get("layer_types"), list):
        kinds = list(dict.fromkeys(own["layer_types"]))
        values["layer_types"] = (kinds * NUM_BLOCKS)[: min(LONGEST_BLOCKS, max(NUM_BLOCKS, len(kinds)))]
        values["num_hidden_layers"] = len(values["layer_types"])
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            values[name] = _tiny_values(inner) | {"model_type": inner.model_type}
            if "vision" in name:
                values[name] |= {key: NUM_BLOCKS + 1 for key in ("num_hidden_layers",) if key in values[name]}
    return values | OWN_SIZES.get(config.model_type, {})


def _logits(net: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, SIZES["vocab_size"], (2, 48), generator=generator)
    with torch.no_grad():
        return net.eval()(input_ids=tokens).logits.float()


def _published_logits(release: Path, source: Path, folder: Path) -> Any:
    """Return the logits of transformers' own model with the published tensors, unpacked in ``folder``."""
    from tests.architectures import dense_net

    return _logits(dense_net(release, source, folder))


def _disturbed_logits(source: Path, outcome: Any) -> Any:
    """Return the logits of the source where the output of every linear has a random error of the size that is stated
    for it: random models may make much more of them than their sum. Experts, which transformers fuses, have none."""
    import torch
    import transformers as t

    from pipeline.graph.outline import open_folder

    stored = {name: model for model, name in open_folder(source).outline.skeleton.names.items()}
    net = t.AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    modules = dict(net.named_modules())
    generator = torch.Generator().manual_seed(0)

    def hook(relative_error: float) -> Any:
        def disturb(module: Any, args: Any, output: Any) -> Any:
            noise = torch.randn(output.shape, generator=generator)
            return output + relative_error * output.norm() / math.sqrt(output.numel()) * noise

        return disturb

    for own in outcome.facts.modules:
        module = modules.get(stored[f"{own.name}.weight"].removesuffix(".weight"))
        if module is not None:
            module.register_forward_hook(hook(own.relative_error))
    return _logits(net)


def _error(found: Any, expected: Any, left_out: float) -> float:
    """Return the relative error of logits, without the share of the tokens that are off by most."""
    wrong = (found - expected).flatten(0, 1).norm(dim=-1)
    size = expected.flatten(0, 1).norm(dim=-1)
    kept = wrong.argsort()[: math.ceil((1 - left_out) * wrong.numel())]
    return float(wrong[kept].norm() / size[kept].norm())


if __name__ == "__main__":
    main()
