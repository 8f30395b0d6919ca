"""Every error survives the way out of a worker process."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pipeline import errors
from pipeline.errors import PipelineError

EVERY_ERROR = [found for found in vars(errors).values() if inspect.isclass(found) and issubclass(found, PipelineError)]


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_an_error_keeps_everything_when_it_is_pickled(kind: type[PipelineError]) -> None:
    error = kind("what", code="a.b", hint="do this", context={"file": "x"})
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (back.message, back.code, back.hint, back.context) == ("what", "a.b", "do this", {"file": "x"})
    assert str(back) == "what\n  do this"


def test_every_error_is_drawn_in_the_tree_with_its_exit_status() -> None:
    assert errors.__doc__
    for kind in EVERY_ERROR:
        assert kind.__name__ in errors.__doc__
        if "exit_status" in vars(kind):
            assert f"{kind.__name__} [{kind.exit_status}]" in errors.__doc__
