"""Blocks, linear groups and producers are found, and what cannot be run is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import CorruptWeightsError, UnsupportedArchitectureError
from pipeline.graph.outline import open_folder
from pipeline.skeleton.smoothing import Fold, find_producers
from tests.architectures import make_model

PRODUCERS = {
    "llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "gemma3": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "gpt2": ["ln_1", "attn.c_attn", "ln_2", None],
    "gpt_neox": ["input_layernorm", None, "post_attention_layernorm", None],
}


@pytest.mark.parametrize("name", sorted(PRODUCERS))
def test_producers_are_found_where_rescaling_changes_nothing(name: str, tmp_path: Path) -> None:
    source = open_folder(make_model(name, tmp_path))
    skeleton = source.outline.skeleton
    with skeleton.attached(0, source.block(0)):
        found = find_producers(skeleton, source.outline.groups[0])
    assert [producer and producer.local_name for producer in found] == PRODUCERS[name]
    assert all(parameter.is_meta for parameter in skeleton.block(0).parameters())
    if name == "gemma3":
        assert found[0] is not None
        assert found[0].fold is Fold.SCALE_PLUS_ONE


def test_linears_that_share_an_input_are_one_group(tmp_path: Path) -> None:
    outline = open_folder(make_model("qwen3", tmp_path)).outline
    assert [group.label for group in outline.groups[1]] == [
        "q_proj+k_proj+v_proj",
        "o_proj",
        "gate_proj+up_proj",
        "down_proj",
    ]
    assert outline.other_linears == ("lm_head",)


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="mixtures of experts"):
        open_folder(make_model("mixtral", tmp_path))


def test_config_of_another_model_is_named(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(CorruptWeightsError, match=r"mlp\.\w+_proj\.weight has the shape"):
        open_folder(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CorruptWeightsError, match=r"no tensor for model\.layers\.2"):
        open_folder(folder)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    remote = {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Net"}}
    (folder / "config.json").write_text(json.dumps(remote))
    with pytest.raises(UnsupportedArchitectureError, match="cannot build"):
        open_folder(folder)
