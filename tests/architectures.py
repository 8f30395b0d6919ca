"""Tiny random instances of real architectures, made from transformers' own config classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.graph.outline import open_folder
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import read_tensors
from pipeline.validate.dense import DenseReader

TOKENIZER_FOLDER = Path(__file__).parent.parent / "jobs" / "demo" / "model"
VOCABULARY = 4096
WEIGHT_GAIN = 3.0
"""Random matrices are scaled up so that predictions are far from uniform and errors show."""

BIAS_SPREAD, NORM_SPREAD = 0.2, 0.8
"""Biases and the logarithms of norm gains, which start as zeros, get this standard deviation: forgetting one shows, and
the channels of what linears read differ enough for activation-aware scaling to pay."""

_COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**_GROUPED),
        "qwen2": lambda: t.Qwen2Config(**_GROUPED),
        "qwen3": lambda: t.Qwen3Config(**_GROUPED, head_dim=64),
        "mistral": lambda: t.MistralConfig(**_GROUPED, sliding_window=16),
        "gemma3": lambda: t.Gemma3TextConfig(
            **_GROUPED, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        "phi3": lambda: t.Phi3Config(**_GROUPED),
        "gpt_neox": lambda: t.GPTNeoXConfig(**_COMMON),
        "opt": lambda: t.OPTConfig(
            hidden_size=128,
            ffn_dim=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
        "gpt2": lambda: t.GPT2Config(
            n_embd=128, n_inner=256, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1
        ),
        "gemma3_vlm": lambda: t.Gemma3Config(
            text_config=t.Gemma3TextConfig(
                **_GROUPED, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
            ).to_dict(),
            vision_config={
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=1,
        ),
        "phi": lambda: t.PhiConfig(**_COMMON),
        "mixtral": lambda: t.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **_GROUPED,
            head_dim=32,
            moe_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        # Latent attention, a shared expert, a first block without experts, and routing limited to half of the groups.
        "deepseek_v3": lambda: t.DeepseekV3Config(
            **{**_COMMON, "num_hidden_layers": 3},
            num_key_value_heads=4,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
        ),
        # A gate of its own on the shared expert.
        "qwen2_moe": lambda: t.Qwen2MoeConfig(
            **_GROUPED,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        # Experts that the checkpoint holds in one tensor.
        "granitemoe": lambda: t.GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        # Blocks that return more than their hidden states: a state that the next one is given, or that nobody reads.
        "rwkv": lambda: t.RwkvConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            attention_hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            context_length=512,
            bos_token_id=0,
            eos_token_id=1,
        ),
        "xlstm": lambda: t.xLSTMConfig(
            vocab_size=VOCABULARY, hidden_size=128, num_heads=4, num_hidden_layers=2, bos_token_id=0, eos_token_id=1
        ),
        # Blocks that look at numbers: a router that counts its tokens.
        "jetmoe": lambda: t.JetMoeConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, kv_channels=32
        ),
        # A linear between the embedding and the first block.
        "opt_projected": lambda: t.OPTConfig(
            hidden_size=128,
            ffn_dim=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
        # Embeddings for each layer, which its blocks are called with, and other heads in global layers.
        "gemma4": lambda: t.Gemma4TextConfig(
            **_GROUPED,
            head_dim=32,
            global_head_dim=64,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
        ),
        "gpt_oss": lambda: t.GptOssConfig(
            **_GROUPED,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
    }


MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe")
MORE_THAN_HIDDEN_STATES = ("rwkv", "xlstm", "gemma4", "jetmoe")
"""What blocks return, or are called with, is more than that."""

DENSE = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "opt", "gpt2")


def tiny_config(name: str, **changes: Any) -> Any:
    """Return the config of a tiny instance, with fields replaced."""
    config = _configs()[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def make_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random instance (fixed seed) with a tokenizer to ``folder`` and return it."""
    return save_instance(tiny_config(name, **changes), folder, dtype)


def save_instance(config: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random instance (fixed seed) of any config with a tokenizer to ``folder`` and return it."""
    import transformers as t

    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    net = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter *= WEIGHT_GAIN
            elif path.endswith(".bias"):
                parameter += BIAS_SPREAD * noise
            else:
                # Gemma's gain is 1 + weight, and its weight starts as 0.
                parameter += torch.exp(NORM_SPREAD * noise) - 1
        for path, buffer in net.named_buffers():
            if path.endswith("e_score_correction_bias"):  # starts as zeros too
                buffer += BIAS_SPREAD * torch.randn_like(buffer)
    net.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER_FOLDER / file, folder / file)
    return folder


def source_net(folder: Path) -> Any:
    """Return transformers' own model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def published_net(folder: Path, source: Path) -> Any:
    """Return transformers' own model of the source with the tensors published in ``folder``, unpacked."""
    dense = _dense(folder, source, open_folder(source).outline.skeleton.names)
    net = source_net(source)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()  # nothing of the source may be left where a published tensor is not loaded
    net.load_state_dict(dense, strict=False)
    net.tie_weights()
    return net


def dense_net(folder: Path, source: Path, root: Path, expert_dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' own model with the published tensors, unpacked under the source's names, so that it merges
    experts itself; written to ``root``."""
    root.mkdir()
    outline = open_folder(source).outline
    dense = _dense(folder, source, {name: name for name in outline.index.entries})
    shapes = {name: entry.shape for name, (_, entry) in read_folder_index(source).entries.items()}
    for name, parts in outline.skeleton.fused_parts(shapes).items():
        dense[name] = torch.cat([dense.pop(part) for part in parts]).reshape(shapes[name])
    rounded = {n: t.to(expert_dtype).float() if ".experts." in n else t.float() for n, t in dense.items()}
    return net_of(rounded, source, root)


def _dense(folder: Path, source: Path, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return a release's tensors, unpacked, by the names that ``names`` has for the checkpoint's."""
    config = json.loads((folder / "config.json").read_text())
    index = read_folder_index(folder)
    groups = [group for block in open_folder(source).outline.groups for group in block]
    reader = DenseReader(config["quantization_config"], [linear for group in groups for linear in group.linears])
    return reader.dense(names, read_tensors(folder, index, index.entries))


def net_of(tensors: dict[str, torch.Tensor], source: Path, root: Path) -> Any:
    """Return transformers' own model of the source's config with other tensors."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, root / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text((source / "config.json").read_text())
    return source_net(root)


def fuse_experts(folder: Path) -> Path:
    """Store a checkpoint's tensors as the model has them, all experts of a block in one, and return the folder."""
    from transformers import AutoModelForCausalLM

    tensors = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def drop_prefix(folder: Path, prefix: str) -> Path:
    """Take a prefix off the names of a checkpoint's tensors, as many uploads have them, and return the folder."""
    file = folder / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder
