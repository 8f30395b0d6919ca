"""Continuations: drafts, prompts side by side and kept blocks change no token that plain greedy decoding gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.graph.outline import open_folder
from pipeline.skeleton.model import Skeleton
from pipeline.validate import generation
from pipeline.validate.agreement import compare_choices
from pipeline.validate.generation import BlockCache, Step, continue_greedily, judge_draft
from tests.architectures import DENSE, make_model

NUM_TOKENS = 20
PROMPTS = [[5, 17, 200, 31], [901, 44, 12, 77, 310, 8, 2000], [7], [64, 65, 66, 67, 68]]
NONE_ENDS: frozenset[int] = frozenset()


class Model:
    """A tiny model that counts how often its blocks are read."""

    def __init__(self, folder: Path) -> None:
        self.source = open_folder(folder)
        self.skeleton: Skeleton = self.source.outline.skeleton
        self.skeleton.attach_outer(self.source.outer())
        self.blocks = [self.source.block(index) for index in range(self.skeleton.num_blocks)]
        self.num_passes = 0

    def load(self, index: int) -> dict[str, Tensor]:
        self.num_passes += index == 0
        return self.blocks[index]

    def go_on(
        self,
        prompts: Sequence[Sequence[int]] = PROMPTS,
        drafts: Sequence[Sequence[int]] = (),
        end_ids: frozenset[int] = NONE_ENDS,
    ) -> list[list[int]]:
        self.num_passes = 0
        found = continue_greedily(self.skeleton, self.load, prompts, NUM_TOKENS, end_ids, drafts)
        return [list(ids) for ids in found]

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [length, vocabulary] from one pass without cache, drafts or neighbours."""
        hidden = self.skeleton.embed(torch.tensor([list(ids)]))
        for index in range(self.skeleton.num_blocks):
            with self.skeleton.attached(index, self.blocks[index]):
                hidden = self.skeleton.run_block(index, hidden)
        return self.skeleton.logits(hidden)[0]

    def plain(self, prompt: Sequence[int]) -> list[int]:
        """Greedy decoding as simple as can be: every token from all before it."""
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def make(name: str) -> Model:
        return Model(make_model(name, tmp_path_factory.mktemp(name) / name))

    return make


def assert_greedy(model: Model, prompt: Sequence[int], found: Sequence[int]) -> None:
    """Each token is the model's own choice, or as likely but for rounding."""
    assert len(found) == NUM_TOKENS
    ids = [*prompt, *found]
    agreement = compare_choices(model.logits(ids), ids, len(prompt))
    assert agreement.total == NUM_TOKENS
    assert agreement.worst_gap < 1e-4


@pytest.mark.parametrize("name", DENSE)
def test_every_architecture_continues_as_plain_greedy_decoding(name: str, model: Callable[[str], Model]) -> None:
    own = model(name)
    found = own.go_on()
    for prompt, ids in zip(PROMPTS, found, strict=True):
        assert_greedy(own, prompt, ids)
    half = [[*ids[:12], 3, 3, 3, 3] for ids in found]
    for drafts in (found, half, [[3] * NUM_TOKENS] * len(PROMPTS), [found[0], half[1], [], [3, 3]]):
        for prompt, ids in zip(PROMPTS, own.go_on(drafts=drafts), strict=True):
            assert_greedy(own, prompt, ids)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_are_those_of_decoding_one_prompt_without_cache(name: str, model: Callable[[str], Model]) -> None:
    own = model(name)
    assert own.go_on() == [own.plain(prompt) for prompt in PROMPTS]
    assert [own.go_on([prompt])[0] for prompt in PROMPTS] == own.go_on()


def test_drafts_decide_how_often_weights_are_read(model: Callable[[str], Model]) -> None:
    own = model("llama")
    prompt = PROMPTS[:1]
    found = own.go_on(prompt)
    assert own.num_passes == NUM_TOKENS
    assert own.go_on(prompt, found) == found
    assert own.num_passes == 2, "the first tokens of the draft, and the others"
    wrong = [[(found[0][0] + 1) % 4096] * NUM_TOKENS]
    assert own.go_on(prompt, wrong) == found
    assert own.num_passes == 1 + NUM_TOKENS - 1, "the draft's pass gives the first token"
    partly = [[*found[0][:12], (found[0][12] + 1) % 4096, *found[0][13:]]]
    assert own.go_on(prompt, partly) == found
    assert own.num_passes == 2 + NUM_TOKENS - 13, "from the first token on that is not the draft's"
    assert own.go_on(prompt, [found[0] + [9] * 5]) == found, "a draft longer than was asked for"
    assert own.go_on(prompt, [found[0][:3]]) == found, "a draft that ends early"


def test_prompts_go_side_by_side(model: Callable[[str], Model]) -> None:
    own = model("llama")
    own.go_on()
    # The longest prompt's last tokens pass while the shortest one is continued.
    assert own.num_passes == NUM_TOKENS + max(map(len, PROMPTS)) - min(map(len, PROMPTS))
    far = [PROMPTS[0], list(range(100, 100 + 3 * NUM_TOKENS))]
    apart = own.go_on(far)
    assert own.num_passes == NUM_TOKENS, "prompts far apart in length go in batches of their own, through one pass"
    for prompt, ids in zip(far, apart, strict=True):
        assert_greedy(own, prompt, ids)


@pytest.mark.parametrize("position", [0, 3, 11, NUM_TOKENS - 1])
def test_an_end_token_ends_a_prompt_and_no_other(position: int, model: Callable[[str], Model]) -> None:
    own = model("qwen2")
    found = own.go_on()
    end = found[0][position]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in found]
    assert own.go_on(end_ids=frozenset({end})) == expected
    for drafts in (found, expected, [[*ids, end] for ids in expected]):
        assert own.go_on(drafts=drafts, end_ids=frozenset({end})) == expected


@pytest.mark.parametrize(
    ("choices", "draft", "expected"),
    [
        ([4, 5, 6], [4, 5], Step((4, 5, 6), has_ended=False)),
        ([4, 5, 6], [3, 5], Step((4,), has_ended=False)),
        ([4, 5, 6], [4, 3], Step((4, 5), has_ended=False)),
        ([4, 9, 6], [4, 9], Step((4,), has_ended=True)),
        ([9, 5, 6], [4, 5], Step((), has_ended=True)),
        ([4, 5, 9], [3, 5], Step((4,), has_ended=False)),
        ([7], [], Step((7,), has_ended=False)),
    ],
)
def test_a_draft_is_kept_as_far_as_it_is_the_model_s_own(choices: list[int], draft: list[int], expected: Step) -> None:
    logits = torch.nn.functional.one_hot(torch.tensor(choices), 10).float()
    assert judge_draft(logits, draft, frozenset({9})) == expected


@pytest.mark.parametrize(
    ("max_bytes", "kept", "dtype"),
    [
        (0, 0, torch.float32),
        (250, 200, torch.bfloat16),
        (1000, 600, torch.bfloat16),
        (1200, 1200, torch.float32),
        (1 << 40, 1200, torch.float32),
    ],
)
def test_blocks_are_kept_within_what_was_granted(max_bytes: int, kept: int, dtype: torch.dtype) -> None:
    loaded: list[int] = []

    def load(index: int) -> dict[str, Tensor]:
        loaded.append(index)
        return {"w": torch.full((100,), float(index), dtype=torch.bfloat16)}

    def dense(index: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weights.pop(name).float() for name in list(weights)}

    blocks = BlockCache(load, dense, max_bytes, dense_bytes=1200)
    for _ in range(2):
        for index in range(3):
            assert float(blocks(index)["w"][0]) == index
            assert blocks.kept_bytes <= max_bytes
    assert blocks.kept_bytes == kept
    num_kept = kept // (100 * dtype.itemsize)
    assert loaded == [0, 1, 2, *range(num_kept, 3)]
    assert blocks(0)["w"].dtype is dtype


def test_blocks_are_kept_only_while_there_is_room_to_read_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SLACK_BYTES", 400)
    asked: list[int] = []

    def loads(room: int) -> list[int]:
        loaded: list[int] = []
        asked.clear()

        def load(index: int) -> dict[str, Tensor]:
            loaded.append(index)
            return {"w": torch.zeros(100)}

        def room_for(num_bytes: int) -> int:
            asked.append(num_bytes)
            return max(0, min(num_bytes, room - blocks.kept_bytes))

        blocks = BlockCache(load, lambda index, weights: weights, 10**9, 10**9, room_for)
        for _ in range(2):
            for index in range(6):
                blocks(index)
        return loaded

    assert loads(10**9) == [*range(6)]
    # Beside two that are kept there is room for two to be read, and for what they leave behind.
    assert loads(400 + 3 * 400 + 400) == [*range(6), 3, 4, 5]
    assert loads(400 + 799) == [*range(6)] * 2
    # Whoever keeps none asks for room again now and then, so that freed memory is given back in time.
    assert asked == [400 + 800, *[800] * 3]
