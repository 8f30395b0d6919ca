"""Releases get names that can be published, or none at all, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import SpecError
from pipeline.graph.naming import name_releases
from pipeline.graph.plan import plan_conversion
from pipeline.hub.source import Source
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec
from pipeline.storage.bucket import SourceBucket
from pipeline.storage.manifest import MAX_NAME_CHARS, check_name

MakeSpec = Callable[..., ConversionSpec]

LONG = "m" * MAX_NAME_CHARS


def source(name: str, *, is_local: bool) -> Source:
    endpoint, commit = (None, None) if is_local else ("http://127.0.0.1:9", "0" * 40)
    return Source(name, is_local, endpoint, commit, (), (), name)


@pytest.mark.parametrize(
    ("release", "name", "is_local", "expected"),
    [
        ("", "model", True, "local/model"),
        ("", "org/model_v1.5", False, "org/model_v1.5"),
        ("", "gpt2", False, "local/gpt2"),
        ("team/my-model", "my model", True, "team/my-model"),
    ],
)
def test_releases_are_called_after_the_spec_or_else_the_source(
    make_spec: MakeSpec, release: str, name: str, is_local: bool, expected: str
) -> None:
    names = name_releases(make_spec(release=release), source(name, is_local=is_local))
    variants = ["gptq-w4-g64", "awq-w4-g64"]
    assert [names.address(variant) for variant in variants] == [f"{expected}-{variant}" for variant in variants]
    assert list(names.by_variant.values()) == [names.address(variant).partition("/")[2] for variant in variants]
    assert names.caution == ""


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [
        ("my model", "my-model"),
        ("_x", "x"),
        (".-x_", "x_"),
        ("Modell (neu), größer", "Modell-neu-gr-er"),
        ("модель", "model"),
        ("", "model"),
        (LONG, LONG[: MAX_NAME_CHARS - len("-gptq-w4-g64")]),
    ],
)
def test_a_folder_whose_name_cannot_be_published_lends_what_can(make_spec: MakeSpec, folder: str, prefix: str) -> None:
    names = name_releases(make_spec(), source(folder, is_local=True))
    assert names.address("gptq-w4-g64") == f"local/{prefix}-gptq-w4-g64"
    assert all(check_name(name, "name") for name in names.by_variant.values())
    assert repr(folder) in names.caution
    assert f"local/{prefix}-" in names.caution
    assert "--release" in names.caution


@pytest.mark.parametrize(
    ("url", "prefix", "has_caution"),
    [
        ("s3://bucket/models/my-model", "my-model", False),
        ("s3://a-bucket", "a-bucket", False),
        ("s3://bucket/models/my model", "my-model", True),
    ],
)
def test_releases_of_a_bucket_are_called_after_the_last_part_of_the_prefix(
    make_spec: MakeSpec, url: str, prefix: str, has_caution: bool
) -> None:
    bucket, _, below = url.removeprefix("s3://").partition("/")
    own = SourceBucket(bucket, below, None)
    names = name_releases(make_spec(), Source(url, False, None, "0" * 64, (), (), url, own))
    assert names.address("gptq-w4-g64") == f"local/{prefix}-gptq-w4-g64"
    assert ("'my model'" in names.caution) == bool(names.caution) == has_caution


@pytest.mark.parametrize(
    ("release", "wrong"),
    [
        ("my team/model", "'my team'"),
        ("team/my model", "'my model-gptq-w4-g64'"),
        ("_team/model", "'_team'"),
        (f"{LONG}m/model", f"'{LONG}m'"),
        (f"team/{LONG}", f"'{LONG}-gptq-w4-g64'"),
        ("model", "is not namespace/name"),
        ("a/b/c", "is not namespace/name"),
        ("/model", "is not namespace/name"),
        ("team/", "is not namespace/name"),
    ],
)
def test_a_release_that_cannot_be_published_is_refused(make_spec: MakeSpec, release: str, wrong: str) -> None:
    with pytest.raises(SpecError, match=re.escape(wrong)) as caught:
        name_releases(make_spec(release=release), source("model", is_local=True))
    assert "--release" in caught.value.hint


def test_a_repository_whose_name_leaves_no_room_for_the_variant_is_refused(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match=f"{'m' * 90}-gptq-w4-g64") as caught:
        name_releases(make_spec(), source("org/" + "m" * 90, is_local=False))
    assert "--release" in caught.value.hint
    assert str(MAX_NAME_CHARS) in caught.value.hint


def test_a_variant_that_leaves_no_room_for_a_name_is_refused(make_spec: MakeSpec) -> None:
    variant = {"name": "v" * MAX_NAME_CHARS, "method": "gptq", "format": "gptq", "group_size": 64}
    with pytest.raises(SpecError, match="cannot be the name of a release"):
        name_releases(make_spec(variants=[variant]), source("model", is_local=True))


def test_a_plan_refuses_and_states_the_same_names(make_spec: MakeSpec, settings: Settings, llama: Path) -> None:
    with pytest.raises(SpecError, match="'my team' cannot be the namespace"):
        plan_conversion(make_spec(release="my team/model"), settings, 1)
    report, _ = plan_conversion(make_spec(release="team/model"), settings, 1)
    assert [variant.release for variant in report.variants] == ["team/model-gptq-w4-g64", "team/model-awq-w4-g64"]
