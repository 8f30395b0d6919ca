"""Sources that cannot be converted are refused with the reason, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import CorruptWeightsError, SourceError, UnsupportedArchitectureError
from pipeline.graph.outline import open_folder
from pipeline.skeleton.limits import kv_cache
from pipeline.skeleton.model import Skeleton
from pipeline.skeleton.tokenizer import TextTokenizer
from tests.architectures import make_model, save_instance


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_unknown_model_type_is_refused_by_name(llama_folder: Path) -> None:
    change_config(llama_folder, model_type="hyperllama")
    with pytest.raises(UnsupportedArchitectureError, match=r"llama/config.json.*hyperllama") as caught:
        Skeleton(llama_folder)
    assert "remote code are refused" in caught.value.hint


def test_model_that_needs_remote_code_is_refused_without_running_it(llama_folder: Path) -> None:
    marker = llama_folder / "ran"
    (llama_folder / "configuration_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_config(llama_folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(UnsupportedArchitectureError, match="cannot build a causal language model"):
        Skeleton(llama_folder)
    assert not marker.exists()


def test_remote_modelling_code_beside_a_known_type_is_not_run(llama_folder: Path) -> None:
    marker = llama_folder / "ran"
    (llama_folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_config(llama_folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    assert Skeleton(llama_folder).architecture == "LlamaForCausalLM"
    assert not marker.exists()


def test_encoder_is_refused(llama_folder: Path) -> None:
    change_config(llama_folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(UnsupportedArchitectureError, match="cannot build a causal language model"):
        Skeleton(llama_folder)


def _dsa() -> Any:
    return t.GlmMoeDsaConfig(
        **dict.fromkeys(("hidden_size", "index_head_dim"), 128),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 256),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
        num_hidden_layers=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        vocab_size=4096,
        pad_token_id=1,
    )


def _shared_keys() -> Any:
    return t.Gemma4TextConfig(
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 4096),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        hidden_size_per_layer_input=32,
        pad_token_id=1,
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (_dsa, "hand on more than hidden states to those after them"),
        (_shared_keys, "hand on more than hidden states to those after them"),
        (
            lambda: t.XLNetConfig(vocab_size=4096, d_model=128, n_layer=2, n_head=4, d_inner=256),
            r"hidden states \[8, 1, 128\] of tokens \[1, 8\]",
        ),
        (
            lambda: t.ReformerConfig(
                vocab_size=4096,
                hidden_size=128,
                axial_pos_embds_dim=[64, 64],
                axial_pos_shape=[8, 64],
                attn_layers=["local", "lsh"],
                is_decoder=True,
            ),
            "cannot be tried on 8 tokens without weights: .*attn_output",
        ),
    ],
    ids=["passes on indices", "shares keys", "length first", "takes two streams"],
)
def test_a_model_whose_blocks_cannot_be_run_alone_is_refused_before_any_weight_is_read(
    config: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    folder = save_instance(config(), tmp_path / "model")
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        open_folder(folder)


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """Gemma 4 has other ones in its global layers than in its local ones."""
    skeleton = open_folder(make_model("gemma4", tmp_path / "model")).outline.skeleton
    assert kv_cache(skeleton, 100) == (100, 2 * 2 * (2 * 32 + 2 * 64) * 100)


def test_missing_tensor_is_named(llama_folder: Path) -> None:
    change_weights(llama_folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CorruptWeightsError, match=r"no tensor for model.layers.1.mlp.up_proj.weight of Llama"
    ) as caught:
        open_folder(llama_folder)
    assert caught.value.code == "source.missing_tensor"


def test_missing_output_head_is_only_accepted_when_it_is_tied(llama_folder: Path) -> None:
    change_weights(llama_folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CorruptWeightsError, match=r"no tensor for lm_head\.weight"):
        open_folder(llama_folder)
    change_config(llama_folder, tie_word_embeddings=True)
    source = open_folder(llama_folder)
    skeleton = source.outline.skeleton
    skeleton.attach_outer(source.outer())
    assert torch.equal(skeleton.net.lm_head.weight, skeleton.net.model.embed_tokens.weight)


def test_wrong_shape_is_named_with_both_shapes(llama_folder: Path) -> None:
    change_config(llama_folder, intermediate_size=320)
    with pytest.raises(CorruptWeightsError, match=r"has the shape \[.*256.*\], but .* needs \[.*320.*\]") as caught:
        open_folder(llama_folder)
    assert caught.value.code == "source.shape"


def test_tensors_the_model_has_no_use_for_are_extra(llama_folder: Path) -> None:
    change_weights(llama_folder, lambda tensors: tensors.update({"vision.patch.weight": torch.ones(2, 2)}))
    assert open_folder(llama_folder).outline.skeleton.extra_names == ("vision.patch.weight",)


def test_quantized_source_is_refused(llama_folder: Path) -> None:
    change_config(llama_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(SourceError, match=r"already quantized \(gptq\)") as caught:
        open_folder(llama_folder)
    assert caught.value.code == "source.quantized"


def test_float8_weights_are_refused(llama_folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(llama_folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedArchitectureError, match=r"stores weights as F8_E4M3; only BF16, F16, F32"):
        open_folder(llama_folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_unreadable_config_is_an_error_of_the_source(llama_folder: Path, content: bytes) -> None:
    (llama_folder / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"config.json of llama cannot be read") as caught:
        open_folder(llama_folder)
    assert caught.value.code == "source.config"


def test_weight_with_nan_is_refused_when_it_is_read(llama_folder: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 5] = float("nan")

    change_weights(llama_folder, poison)
    source = open_folder(llama_folder)
    assert source.block(0)
    with pytest.raises(CorruptWeightsError, match=name):
        source.block(1)


def test_folder_without_tokenizer_is_refused(llama_folder: Path) -> None:
    (llama_folder / "tokenizer.json").unlink()
    (llama_folder / "tokenizer_config.json").unlink()
    with pytest.raises(SourceError, match="the tokenizer of llama cannot be loaded") as caught:
        TextTokenizer(llama_folder)
    assert caught.value.code == "source.tokenizer"


def test_tokenizer_knows_every_end_token(llama_folder: Path) -> None:
    (llama_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    tokenizer = TextTokenizer(llama_folder)
    assert tokenizer.end_ids == {1, 7}
    ids = tokenizer.encode("The people of the United States")
    assert tokenizer.decode(ids) == "The people of the United States"
    assert ids
    assert not set(ids) & tokenizer.end_ids


@pytest.mark.parametrize(("value", "expected"), [(7, {1, 7}), ([7, 9], {1, 7, 9}), (None, {1}), ([], {1})])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_come_from_the_generation_config_else_from_the_config(
    llama_folder: Path, name: str, value: int | list[int] | None, expected: set[int]
) -> None:
    (llama_folder / "generation_config.json").unlink()
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 11}))
    (llama_folder / name).write_text(json.dumps({**config, "eos_token_id": value}))
    assert TextTokenizer(llama_folder).end_ids == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "not an object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
        ('{"eos_token_id": [1, null]}', "eos_token_id is [1, None]"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
    ],
)
def test_a_damaged_generation_config_is_refused_by_name(llama_folder: Path, content: str, reason: str) -> None:
    (llama_folder / "generation_config.json").write_text(content)
    with pytest.raises(SourceError, match=r"generation_config\.json of llama") as caught:
        TextTokenizer(llama_folder)
    assert reason in caught.value.message
    assert caught.value.code == "source.tokenizer"
    assert caught.value.hint
