"""What is wrong with a source is said in the source's name, not in that of a scratch folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.graph.plan import remote_outline
from pipeline.hub.source import pin_source
from pipeline.settings import Settings
from pipeline.spec import ExpertStatistics


@pytest.mark.parametrize("config", ["{", '{"model_type": "unheard_of", "architectures": ["X"]}'])
def test_a_config_that_cannot_be_used_is_named_after_its_source(
    config: str, llama: Path, settings: Settings, tmp_path: Path
) -> None:
    source = tmp_path / "my-model"
    shutil.copytree(llama, source)
    (source / "config.json").write_text(config)
    with pytest.raises(SourceError) as caught:
        remote_outline(pin_source(str(source), settings), settings, ExpertStatistics.ALL)
    assert "my-model" in str(caught.value)
    assert "bitmill-plan" not in json.dumps([str(caught.value), caught.value.hint])
