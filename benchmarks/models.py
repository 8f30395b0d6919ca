"""Random Llama models of any depth and width, written block by block.

The config comes from transformers' own class, the tokenizer from the demo model, the weights from a fixed seed. One
file for each block, so that a model of any size is made in the memory of one block.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER_FOLDER = Path(__file__).parents[1] / "jobs" / "demo" / "model"
VOCABULARY = 4096
MAX_POSITIONS = 2048

GAIN = 0.7
"""Standard deviation of a matrix times the root of its in_features: outputs stay of the order of inputs, and
predictions far from uniform."""

NORM_SPREAD = 0.8
"""Standard deviation of the logarithm of norm gains: channels differ, as those of trained models do."""


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        layers: Decoder blocks.
        hidden: Width of the residual stream, a multiple of ``head_size`` and ``sharing``.
        intermediate: Width of the MLP.
        vocabulary: Tokens; those beyond the tokenizer's never occur.
        head_size: Width of an attention head.
        sharing: Heads of queries that share one of keys and values.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int = VOCABULARY
    head_size: int = 64
    sharing: int = 2

    @property
    def key_width(self) -> int:
        """Width of all keys, and of all values."""
        return self.hidden // self.sharing

    @property
    def block_parameters(self) -> int:
        """Weights of one block's matrices."""
        return 2 * self.hidden * (self.hidden + self.key_width) + 3 * self.hidden * self.intermediate


LLAMA_8B = Shape(layers=32, hidden=4096, intermediate=14336, vocabulary=128256, head_size=128, sharing=4)
"""The sizes of Llama-3.1-8B."""


def make_llama(folder: Path, shape: Shape) -> Path:
    """Write a random model in bfloat16 with a tokenizer to a new folder and return it."""
    folder.mkdir(parents=True)
    _write_config(folder, shape)
    files: dict[str, str] = {}
    total_bytes = 0
    for part in range(shape.layers + 1):
        tensors = _block(part - 1, shape) if part else _outer(shape)
        file = f"model-{part + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER_FOLDER / file, folder / file)
    return folder


def _write_config(folder: Path, shape: Shape) -> None:
    from transformers import LlamaConfig

    heads = shape.hidden // shape.head_size
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shape.sharing,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ).save_pretrained(folder)


def _outer(shape: Shape) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(shape.vocabulary, shape.hidden, generator=random).bfloat16(),
        "model.norm.weight": _norm(shape.hidden, random),
        "lm_head.weight": _matrix(shape.vocabulary, shape.hidden, random),
    }


def _block(index: int, shape: Shape) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1 + index)
    wide, keys, middle = shape.hidden, shape.key_width, shape.intermediate
    sizes = {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (keys, wide),
        "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (middle, wide),
        "mlp.up_proj": (middle, wide),
        "mlp.down_proj": (wide, middle),
    }
    tensors = {f"{name}.weight": _matrix(*size, random) for name, size in sizes.items()}
    tensors |= {f"{name}.weight": _norm(wide, random) for name in ("input_layernorm", "post_attention_layernorm")}
    return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def _matrix(rows: int, columns: int, random: torch.Generator) -> Tensor:
    return (torch.randn(rows, columns, generator=random) * (GAIN / columns**0.5)).bfloat16()


def _norm(size: int, random: torch.Generator) -> Tensor:
    return torch.exp(NORM_SPREAD * torch.randn(size, generator=random)).bfloat16()
