"""What is published is told, also when the command fails afterwards."""

from __future__ import annotations

from pathlib import Path

from tests.acceptance.conftest import DEMO_MODEL, SMALL, Bitmill


def test_folders_published_before_an_upload_fails_are_on_standard_output(bitmill: Bitmill, tmp_path: Path) -> None:
    target = tmp_path / "out"
    blocked = target / "releases" / "local" / "model-rtn-w8-g64"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the second variant's folder would be")
    variants = ("--variant", "rtn-w8-g128", "--variant", "rtn-w8-g64")
    done = bitmill("convert", DEMO_MODEL, *variants, *SMALL, "--to", target)
    assert done.returncode == 6, done.stderr
    assert str(blocked) in done.stderr
    (location,) = done.stdout.splitlines()
    assert (Path(location) / "manifest.json").is_file()
    assert Path(location).parent.name == "model-rtn-w8-g128"
