"""Events in their JSON form, and text made safe to show."""

from __future__ import annotations

import json
import math
import pickle

import pytest

from pipeline.observe.events import (
    Degraded,
    EngineNews,
    Event,
    EventKind,
    Failed,
    JobRevised,
    JobStarted,
    Phase,
    PhaseWork,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    Warned,
    WidthsChosen,
    WorkersReady,
    WorkersStarting,
    to_json,
)
from pipeline.observe.terminal import one_line, printable

EVERY_EVENT: tuple[Event, ...] = (
    JobStarted("acme/tiny", ("a", "b"), 2, (PhaseWork(Phase.SOLVE, 4, 8.0),)),
    StageFinished(Phase.SOLVE, 1.5, 2.0, block=1, variant="a", group="mlp.down_proj", loss=0.25, relative_error=0.1),
    Warned("text\nover two lines"),
    Degraded("a", "model.layers.0.mlp.down_proj", "damping 0.04"),
    VariantJudged("a", False, ("relative_error: too large",), {"kl": math.inf}),
    Published("a", "acme/tiny-a", "r1", "/srv/r1", 100),
    Failed("graph.failed", "a worker died", "run it again"),
    SourceAdvanced("model.safetensors", 5, 10),
    WorkersStarting(2),
    WorkersReady(1, 2),
    WidthsChosen("a", {"3": 10, "4": 20}, 0.0123),
    JobRevised((PhaseWork(Phase.PACK, 2, 1.0),)),
    EngineNews("transformers", "a: loading it in transformers"),
)


def test_every_kind_of_event_is_covered_here() -> None:
    assert {event.kind for event in EVERY_EVENT} == set(EventKind)


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: event.kind.value)
def test_an_event_is_one_line_of_strict_json_that_names_its_kind_first(event: Event) -> None:
    line = to_json(event)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert "\n" not in line
    assert next(iter(json.loads(line, parse_constant=refuse).items())) == ("event", event.kind.value)


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: event.kind.value)
def test_events_survive_pickling(event: Event) -> None:
    assert pickle.loads(pickle.dumps(event)) == event


def test_the_json_of_a_stage_holds_every_field() -> None:
    assert json.loads(to_json(EVERY_EVENT[1])) == {
        "event": "stage_finished",
        "phase": "solve",
        "seconds": 1.5,
        "cost": 2.0,
        "block": 1,
        "variant": "a",
        "group": "mlp.down_proj",
        "loss": 0.25,
        "relative_error": 0.1,
        "reused": False,
    }


def test_nested_work_and_numbers_that_are_none_become_plain_json() -> None:
    assert json.loads(to_json(EVERY_EVENT[0]))["work"] == [{"phase": "solve", "num_units": 4, "cost": 8.0}]
    assert json.loads(to_json(EVERY_EVENT[4]))["figures"] == {"kl": "Infinity"}
    assert json.loads(to_json(StageFinished(Phase.SOLVE, 1.0, 1.0, loss=math.nan)))["loss"] == "NaN"


@pytest.mark.parametrize("unsafe", ["\x1b", "\r", "\x07", "\x9b", "\u202e", "\u2028", "\ud800"])
def test_text_cannot_steer_a_terminal(unsafe: str) -> None:
    assert printable(f"a{unsafe}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_ordinary_text_in_any_script_is_left_alone() -> None:
    text = "naïve 東京 👩\u200d🔬\n\tend"
    assert printable(text) == text


def test_one_line_has_no_line_break_and_no_double_space() -> None:
    assert one_line(" a\n\n b\tc ") == "a b c"
