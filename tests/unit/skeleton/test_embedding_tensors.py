"""What hidden states that enter the first block follow from: everything that matters, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UnsupportedArchitectureError
from pipeline.graph.outline import Source, open_folder
from pipeline.skeleton import tables
from pipeline.skeleton.model import Skeleton
from tests.architectures import DENSE, VOCABULARY, make_model

SourceOf = Callable[[str], Source]
TOKENS_BL = torch.arange(2, VOCABULARY, VOCABULARY // 12)[None]
RARE = 7
"""A token that nothing is probed with."""

EMBEDDING = {
    "llama": ["model.embed_tokens.weight"],
    "qwen2": ["model.embed_tokens.weight"],
    "qwen3": ["model.embed_tokens.weight"],
    "mistral": ["model.embed_tokens.weight"],
    "gemma3": ["model.embed_tokens.weight"],
    "phi3": ["model.embed_tokens.weight"],
    "gpt_neox": ["gpt_neox.embed_in.weight"],
    "opt": ["model.decoder.embed_positions.weight", "model.decoder.embed_tokens.weight"],
    "gpt2": ["transformer.wpe.weight", "transformer.wte.weight"],
    "phi": ["model.embed_tokens.weight"],
    "gemma3_vlm": ["model.language_model.embed_tokens.weight"],
    "opt_projected": [
        "model.decoder.embed_positions.weight",
        "model.decoder.embed_tokens.weight",
        "model.decoder.project_in.weight",
    ],
    "gemma4": [
        "model.embed_tokens.weight",
        "model.embed_tokens_per_layer.weight",
        "model.per_layer_model_projection.weight",
        "model.per_layer_projection_norm.weight",
    ],
}


def hidden_states(skeleton: Skeleton, outer: dict[str, Tensor]) -> Tensor:
    skeleton.attach_outer(outer)
    found = skeleton.embed(TOKENS_BL)
    skeleton.detach_outer()
    return found


@pytest.mark.parametrize("name", EMBEDDING)
def test_hidden_states_change_with_what_is_read_and_with_nothing_else(name: str, source_of: SourceOf) -> None:
    source = source_of(name)
    skeleton, outer = source.outline.skeleton, source.outer()
    read = skeleton.embedding_tensors()
    assert sorted(read) == EMBEDDING[name]
    assert read.items() <= skeleton.outer_tensors().items()
    before = hidden_states(skeleton, outer)
    for tensor in outer:
        changed = hidden_states(skeleton, {**outer, tensor: outer[tensor] + 1})
        assert torch.equal(changed, before) == (tensor not in read), tensor


@pytest.mark.parametrize("name", EMBEDDING)
def test_hidden_states_are_made_without_anything_else(name: str, source_of: SourceOf) -> None:
    source = source_of(name)
    skeleton = source.outline.skeleton
    expected = hidden_states(skeleton, source.outer())
    with skeleton.embedding_attached(source.read(skeleton.embedding_tensors())):
        rest = {n: t for n, t in skeleton.net.state_dict().items() if n in skeleton.outer_tensors()}
        assert {n for n, t in rest.items() if not t.is_meta} == set(EMBEDDING[name])
        skeleton._calls.clear()
        assert torch.equal(skeleton.embed(TOKENS_BL), expected)
        # Finding the blocks' arguments must not bring it back.
        assert {n for n in rest if not skeleton.net.state_dict()[n].is_meta} == set(EMBEDDING[name])
    assert not any(t.is_meta for n, t in skeleton.net.state_dict().items() if n in rest)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_large_table_is_all_that_is_needed_too(
    name: str, source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(name)
    skeleton = source.outline.skeleton
    expected = hidden_states(skeleton, source.outer())
    monkeypatch.setattr(tables, "TABLE_ELEMENTS", 0)
    with skeleton.embedding_attached(source.read(skeleton.embedding_tensors())):
        assert skeleton.tables.held
        assert torch.equal(skeleton.embed(TOKENS_BL), expected)


def test_all_dense_architectures_are_tried() -> None:
    assert set(DENSE) < set(EMBEDDING)


@pytest.mark.parametrize(
    ("held", "dropped"),
    [("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight", "model.embed_tokens.weight")],
)
def test_of_tied_tensors_the_one_that_is_stored_is_read(held: str, dropped: str, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    tensors.pop("lm_head.weight", None)
    save_file({**tensors, held: table}, folder / "model.safetensors", {"format": "pt"})
    source = open_folder(folder)
    skeleton = source.outline.skeleton
    assert dropped not in skeleton.outer_tensors()
    assert skeleton.embedding_tensors() == {held: held}
    with skeleton.embedding_attached(source.read(skeleton.embedding_tensors())):
        assert torch.equal(skeleton.embed(TOKENS_BL), table.float()[TOKENS_BL])


@contextmanager
def hooked(skeleton: Skeleton, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the context, what the embedding gives is changed: ``change(ids, hidden)``."""
    handle = skeleton.net.get_input_embeddings().register_forward_hook(
        lambda module, args, output: change(args[0], output)
    )
    try:
        yield
    finally:
        handle.remove()


def test_when_in_doubt_everything_is_read(llama_folder: Path) -> None:
    skeleton = open_folder(llama_folder).outline.skeleton
    with hooked(skeleton, lambda ids, hidden: hidden + torch.rand(())):
        assert skeleton.embedding_tensors() == skeleton.outer_tensors()


def test_what_is_read_without_showing_in_the_hidden_states_counts(llama_folder: Path) -> None:
    skeleton = open_folder(llama_folder).outline.skeleton
    with hooked(skeleton, lambda ids, hidden: hidden + 0 * skeleton.net.model.norm.weight):
        assert set(skeleton.embedding_tensors()) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_what_is_read_for_a_rare_token_only_is_an_error_not_other_numbers(llama_folder: Path) -> None:
    source = open_folder(llama_folder)
    skeleton = source.outline.skeleton

    def change(ids: Tensor, hidden: Tensor) -> Tensor:
        return hidden + skeleton.net.model.norm.weight if bool((ids == RARE).any()) else hidden

    with hooked(skeleton, change):
        read = skeleton.embedding_tensors()
        assert list(read) == ["model.embed_tokens.weight"]
        with skeleton.embedding_attached(source.read(read)):
            skeleton.embed(TOKENS_BL)
            with pytest.raises(
                UnsupportedArchitectureError, match="more weights before its first block for some tokens"
            ):
                skeleton.embed(torch.tensor([[1, RARE]]))
