"""Well-known models as shapes: enough to plan and simulate their conversion without a byte of them.

The sizes are those of the published config.json files. Linears that are called on one input are one group, as
``skeleton.groups`` would find them: q/k/v; gate/up; in a mixture of experts gate and up of all experts, the shared ones
included, where all tokens pass through all experts, else those of each. Every expert's down has an input of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from pipeline.errors import PlanError
from pipeline.skeleton.groups import LinearGroup, LinearRef
from pipeline.spec import ExpertStatistics
from pipeline.tensors.header import TensorEntry
from pipeline.tensors.index import WeightIndex

LLAMA_VOCABULARY = 128_256

CONFIGS: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": LLAMA_VOCABULARY,
    },
    "llama-3.1-70b": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": LLAMA_VOCABULARY,
    },
    "llama-3.1-405b": {
        "num_hidden_layers": 126,
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": LLAMA_VOCABULARY,
    },
    "deepseek-v3": {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "vocab_size": 129_280,
    },
}
"""Of config.json, what sizes follow from; names as there."""

_BFLOAT16_BYTES = 2
_EMBEDDING = "model.embed_tokens.weight"
_EXPERTS = "mlp.experts"

Linears = list[tuple[str, int, int]]
"""Local name, out_features and in_features of linears that share an input."""


def named_shape(name: str, experts: ExpertStatistics = ExpertStatistics.ALL) -> ShapeOutline:
    """Return a model by its name in ``CONFIGS``.

    Raises:
        PlanError: when there is none.
    """
    if name not in CONFIGS:
        raise PlanError(
            f"there is no shape called {name!r}", code="plan.shape", hint=f"choose one of {', '.join(CONFIGS)}"
        )
    return ShapeOutline(name, CONFIGS[name], experts)


def block_linears(
    config: Mapping[str, int], block: int, experts: ExpertStatistics = ExpertStatistics.ALL
) -> list[Linears]:
    """Return the linears of one block of a Llama or a DeepSeek V3, those that share an input together."""
    attention = _latent_attention(config) if "q_lora_rank" in config else _attention(config)
    return [*attention, *_feed(config, block, experts)]


def _attention(config: Mapping[str, int]) -> list[Linears]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = hidden // heads
    shared = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", config["num_key_value_heads"] * width, hidden),
        ("self_attn.v_proj", config["num_key_value_heads"] * width, hidden),
    ]
    return [shared, [("self_attn.o_proj", hidden, hidden)]]


def _latent_attention(config: Mapping[str, int]) -> list[Linears]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    shared = [("self_attn.q_a_proj", query, hidden), ("self_attn.kv_a_proj_with_mqa", latent + rope, hidden)]
    return [
        shared,
        [("self_attn.q_b_proj", heads * (plain + rope), query)],
        [("self_attn.kv_b_proj", heads * (plain + value), latent)],
        [("self_attn.o_proj", hidden, heads * value)],
    ]


def _feed(config: Mapping[str, int], block: int, experts: ExpertStatistics) -> list[Linears]:
    hidden, num_experts = config["hidden_size"], config.get("n_routed_experts", 0)
    if block < config.get("first_k_dense_replace", 0) or not num_experts:
        owners = {"mlp": config["intermediate_size"]}
    else:
        width = config["moe_intermediate_size"]
        owners = {f"{_EXPERTS}.{number}": width for number in range(num_experts)}
        owners["mlp.shared_experts"] = config["n_shared_experts"] * width
    entering = {
        owner: [(f"{owner}.{part}_proj", width, hidden) for part in ("gate", "up")] for owner, width in owners.items()
    }
    leaving = {owner: [(f"{owner}.down_proj", hidden, width)] for owner, width in owners.items()}
    if experts is ExpertStatistics.ALL:
        return [[linear for linears in entering.values() for linear in linears], *leaving.values()]
    return [linears for owner in owners for linears in (entering[owner], leaving[owner])]


@dataclass(frozen=True)
class ShapeOutline:
    """A model that is known by its config alone.

    Attributes:
        name: Of the model.
        config: What sizes follow from.
        experts: Which tokens the statistics of experts are of.
    """

    name: str
    config: Mapping[str, int]
    experts: ExpertStatistics = ExpertStatistics.ALL

    @cached_property
    def groups(self) -> tuple[tuple[LinearGroup, ...], ...]:
        """The linear groups of each block."""
        return tuple(tuple(self._block_groups(block)) for block in range(self.config["num_hidden_layers"]))

    def _block_groups(self, block: int) -> Iterator[LinearGroup]:
        for linears in block_linears(self.config, block, self.experts):
            yield LinearGroup(
                block,
                tuple(
                    LinearRef(local, f"{_block_name(block)}.{local}", rows, columns, False, _expert(local))
                    for local, rows, columns in linears
                ),
            )

    @cached_property
    def skeleton(self) -> ShapeSkeleton:
        """Where every tensor belongs."""
        blocks = tuple(
            {local: f"{_block_name(block)}.{local}" for local in self._block_shapes(block)}
            for block in range(self.config["num_hidden_layers"])
        )
        architecture = "DeepseekV3ForCausalLM" if "q_lora_rank" in self.config else "LlamaForCausalLM"
        return ShapeSkeleton(architecture, blocks, {name: name for name in self._outer_shapes()})

    @cached_property
    def index(self) -> WeightIndex:
        """Where every tensor would lie: a file for each block and one for the rest."""
        files = {"model-outer.safetensors": self._outer_shapes()}
        for block in range(self.config["num_hidden_layers"]):
            shapes = {f"{_block_name(block)}.{local}": shape for local, shape in self._block_shapes(block).items()}
            files[f"model-{block:05d}.safetensors"] = shapes
        entries: dict[str, tuple[str, TensorEntry]] = {}
        for file, shapes in files.items():
            start = 0
            for name, shape in shapes.items():
                end = start + _BFLOAT16_BYTES * prod(shape)
                entries[name] = (file, TensorEntry(name, "BF16", shape, start, end))
                start = end
        total = sum(entry.num_bytes for _, entry in entries.values())
        return WeightIndex(dict(sorted(entries.items())), tuple(sorted(files)), total, total // _BFLOAT16_BYTES)

    @property
    def other_linears(self) -> tuple[str, ...]:
        """Names of linears that no variant quantizes."""
        routers = (
            f"{_block_name(block)}.mlp.gate"
            for block in range(self.config["num_hidden_layers"])
            if "mlp.gate.weight" in self.skeleton.block_tensors(block)
        )
        return (*routers, "lm_head")

    @property
    def vocabulary_size(self) -> int:
        """Number of logits of one position."""
        return self.config["vocab_size"]

    def tensor_bytes(self, name: str) -> int:
        """Return the stored size of one tensor."""
        return self.index.entries[name][1].num_bytes

    def tensor_elements(self, name: str) -> int:
        """Return the number of elements of one tensor."""
        return self.index.entries[name][1].num_elements

    def _block_shapes(self, block: int) -> dict[str, tuple[int, ...]]:
        hidden, experts = self.config["hidden_size"], self.config.get("n_routed_experts", 0)
        shapes: dict[str, tuple[int, ...]] = {
            linear.local_name + ".weight": (linear.out_features, linear.in_features)
            for group in self.groups[block]
            for linear in group.linears
        }
        shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if "q_lora_rank" in self.config:
            shapes["self_attn.q_a_layernorm.weight"] = (self.config["q_lora_rank"],)
            shapes["self_attn.kv_a_layernorm.weight"] = (self.config["kv_lora_rank"],)
        if experts and block >= self.config["first_k_dense_replace"]:
            shapes["mlp.gate.weight"] = (experts, hidden)
            shapes["mlp.gate.e_score_correction_bias"] = (experts,)
        return shapes

    def _outer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, vocabulary = self.config["hidden_size"], self.config["vocab_size"]
        return {
            _EMBEDDING: (vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocabulary, hidden),
        }


@dataclass(frozen=True)
class ShapeSkeleton:
    """Where the tensors of a ``ShapeOutline`` belong.

    Attributes:
        architecture: Name of the transformers class.
        blocks: Of each block, checkpoint names by local name.
        outer: Checkpoint names outside the blocks, by model name.
    """

    architecture: str
    blocks: tuple[Mapping[str, str], ...]
    outer: Mapping[str, str]
    extra_names: tuple[str, ...] = ()
    carried_size: int = 0

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the decoder blocks in order."""
        return tuple(_block_name(block) for block in range(self.num_blocks))

    def block_tensors(self, index: int) -> Mapping[str, str]:
        """Return checkpoint names by the names local to one block."""
        return self.blocks[index]

    def outer_tensors(self) -> Mapping[str, str]:
        """Return checkpoint names by model name for everything outside the blocks."""
        return self.outer

    def embedding_tensors(self) -> Mapping[str, str]:
        """Return those of them that the hidden states entering the first block follow from."""
        return {_EMBEDDING: self.outer[_EMBEDDING]}


def _expert(local_name: str) -> str:
    owner = local_name.rpartition(".")[0]
    return owner if owner.startswith(f"{_EXPERTS}.") else ""


def _block_name(block: int) -> str:
    return f"model.layers.{block}"
