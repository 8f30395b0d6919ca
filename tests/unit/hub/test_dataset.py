"""Calibration text from a dataset repository is pinned, verified and named with its commit."""

from __future__ import annotations

import pytest

from pipeline.errors import CorruptWeightsError, SourceNotFoundError, SpecError
from pipeline.hub.dataset import fetch_dataset_file
from pipeline.settings import Settings
from tests.loopback_hub import Fault, LoopbackHub


@pytest.mark.parametrize("revision", ["", "@main", "@v1"])
def test_a_file_is_fetched_once_and_named_with_its_commit(hub: LoopbackHub, settings: Settings, revision: str) -> None:
    files = {"data/train.txt": b"some text", "data/big.parquet": b"x" * 1000}
    commit = hub.add("org/texts", files, kind="dataset", revision=revision[1:] or "main")
    path, provenance = fetch_dataset_file(f"hub:org/texts{revision}:data/train.txt", settings)
    assert path.read_bytes() == b"some text"
    assert provenance == f"hub:org/texts@{commit}:data/train.txt"
    assert fetch_dataset_file(provenance, settings) == (path, provenance)
    assert hub.ranges("train.txt") == ["bytes=0-8"]
    assert hub.ranges("big.parquet") == []


def test_an_absent_file_names_what_is_there(hub: LoopbackHub, settings: Settings) -> None:
    hub.add("org/texts", {"train.txt": b"some text"}, kind="dataset")
    with pytest.raises(SourceNotFoundError, match=r"has no file 'test\.txt'") as caught:
        fetch_dataset_file("hub:org/texts:test.txt", settings)
    assert caught.value.hint == "it has train.txt"


def test_a_model_of_that_name_is_no_dataset(
    hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes]
) -> None:
    hub.add("org/texts", model_files)
    with pytest.raises(SourceNotFoundError, match="no repository org/texts"):
        fetch_dataset_file("hub:org/texts:config.json", settings)


def test_wrong_bytes_are_refused(hub: LoopbackHub, settings: Settings) -> None:
    hub.add("org/texts", {"train.txt": b"some text"}, kind="dataset")
    hub.faults.append(Fault("train.txt", flip=True))
    with pytest.raises(CorruptWeightsError, match="the hub announced"):
        fetch_dataset_file("hub:org/texts:train.txt", settings)


@pytest.mark.parametrize("text", ["org/texts:train.txt", "hub:org/texts", "hub:org/texts:", "hub::x", "hub:a/b@:c"])
def test_another_form_is_a_mistake_in_the_spec(settings: Settings, text: str) -> None:
    with pytest.raises(SpecError, match="is not of the form") as caught:
        fetch_dataset_file(text, settings)
    assert "hub:org/dataset@main:data/train.jsonl" in caught.value.hint


def test_a_gated_dataset_says_where_its_conditions_are(hub: LoopbackHub, settings: Settings) -> None:
    hub.add("org/texts", {"train.txt": b"some text"}, kind="dataset", gated=True)
    with pytest.raises(SourceNotFoundError, match=r"^dataset org/texts is gated") as caught:
        fetch_dataset_file("hub:org/texts:train.txt", settings)
    assert f"accept its conditions at {hub.url}/datasets/org/texts, then" in caught.value.hint


def test_an_absent_revision_of_a_dataset_says_where_they_are_listed(hub: LoopbackHub, settings: Settings) -> None:
    hub.add("org/texts", {"train.txt": b"some text"}, kind="dataset")
    with pytest.raises(SourceNotFoundError, match="has no revision 'v9'") as caught:
        fetch_dataset_file("hub:org/texts@v9:train.txt", settings)
    assert f"{hub.url}/datasets/org/texts/tree/main" in caught.value.hint
