"""The three sinks, with a clock that the tests turn."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from pipeline.observe.events import (
    Degraded,
    EventSink,
    Failed,
    JobStarted,
    Phase,
    PhaseWork,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    Warned,
)
from pipeline.observe.progress import JsonProgress, LiveProgress, PlainProgress, ProgressMode, make_sink

JOB = JobStarted("acme/tiny", ("gptq-w4-g128", "awq-w4-g128"), 3, (PhaseWork(Phase.SOLVE, 6, 6.0),))


class Clock:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def solved(block: int, variant: str = "gptq-w4-g128") -> StageFinished:
    return StageFinished(Phase.SOLVE, 1.0, 1.0, block=block, variant=variant, group="mlp.down_proj", loss=0.0123)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(clock: Clock) -> Iterator[tuple[LiveProgress, Console]]:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30, color_system=None, _environ={})
    sink = LiveProgress(console, clock, auto_refresh=False)
    yield sink, console
    sink.close()


def frame(sink: LiveProgress, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(sink.render())
    return capture.get()


def test_plain_lines_come_at_a_phase_s_ends_and_then_at_most_every_few_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    sink = PlainProgress(stream, clock, interval_s=5.0)
    sink.emit(JOB)
    for block in range(6):
        clock.now_s += 2.0
        sink.emit(solved(block))
    assert stream.getvalue().splitlines() == [
        "[0:00:00] acme/tiny: 3 blocks, variants gptq-w4-g128, awq-w4-g128",
        "[0:00:02] solve 1/6, gptq-w4-g128, block 0 mlp.down_proj, loss 0.0123, about 10 s left",
        "[0:00:08] solve 4/6, gptq-w4-g128, block 3 mlp.down_proj, loss 0.0123, about 4 s left",
        "[0:00:12] solve 6/6, gptq-w4-g128, block 5 mlp.down_proj, loss 0.0123",
    ]


def test_plain_says_what_matters_at_once_and_leaves_the_error_to_the_command(clock: Clock) -> None:
    stream = io.StringIO()
    sink = PlainProgress(stream, clock)
    for event in (
        Warned("the hub is slow"),
        Degraded("a", "model.layers.0.mlp.down_proj", "damping 0.04 instead of 0.01"),
        VariantJudged("a", True, figures={"kl": 0.03125, "source_perplexity": 22.61}),
        VariantJudged("b", False, ("relative_error: mlp.down_proj 0.41 > 0.35", "generation: repeats")),
        Published("a", "acme/tiny-a", "r1", "s3://bucket/releases/acme/tiny-a/r1", 98_300_000),
        Failed("graph.failed", "a worker died"),
    ):
        sink.emit(event)
    assert stream.getvalue().splitlines() == [
        "[0:00:00] ! the hub is slow",
        "[0:00:00] ! a: model.layers.0.mlp.down_proj: damping 0.04 instead of 0.01",
        "[0:00:00] + a passed: KL 0.0312, source perplexity 22.6",
        "[0:00:00] x b failed: relative_error: mlp.down_proj 0.41 > 0.35; generation: repeats",
        "[0:00:00] + acme/tiny-a (98.3 MB) published: s3://bucket/releases/acme/tiny-a/r1",
    ]


def test_files_on_their_way_are_told_before_the_job_starts(clock: Clock, live: tuple[LiveProgress, Console]) -> None:
    stream = io.StringIO()
    sink = PlainProgress(stream, clock, interval_s=5.0)
    for done_bytes in (4, 8, 12, 16):
        event = SourceAdvanced("model.safetensors", done_bytes * 10**9, 16 * 10**9)
        sink.emit(event)
        live[0].emit(event)
        clock.now_s += 2.0
        assert f"source files {done_bytes} GB of 16 GB" in frame(live[0])
    assert stream.getvalue().splitlines() == [
        "[0:00:00] source files 4 GB of 16 GB",
        "[0:00:06] source files 16 GB of 16 GB",
    ]


def test_plain_writes_names_that_the_log_s_encoding_lacks(clock: Clock) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainProgress(stream, clock).emit(Warned("東\x1b[31m"))
    assert raw.getvalue() == b"[0:00:00] ! \\u6771\\ufffd[31m\n"


def test_json_is_one_object_per_event(clock: Clock) -> None:
    stream = io.StringIO()
    with JsonProgress(stream) as sink:
        for event in (JOB, solved(0), Failed("graph.failed", "a worker\ndied")):
            sink.emit(event)
    kinds = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    assert kinds == ["job_started", "stage_finished", "failed"]


def test_the_live_view_shows_phases_variants_time_and_loss(clock: Clock, live: tuple[LiveProgress, Console]) -> None:
    sink, _ = live
    sink.emit(JOB)
    clock.now_s += 65.0
    sink.emit(StageFinished(Phase.SOLVE, 65.0, 1.0, 0, "gptq-w4-g128", loss=0.0123, relative_error=0.0412))
    sink.emit(Degraded("gptq-w4-g128", "m", "r"))
    lines = [" ".join(line.split()) for line in frame(sink).splitlines()]
    assert lines[1] == "acme/tiny 1 min 05 s · about 5 min 25 s left"
    assert lines[3].startswith("solve")
    assert lines[3].endswith("1/6 block 0")
    assert lines[6:] == [
        "gptq-w4-g128 1/3 0.0123 4.12 % - quantizing, 1 degraded",
        "awq-w4-g128 - - - - waiting",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_view_keeps_to_the_width_of_the_terminal(
    clock: Clock, live: tuple[LiveProgress, Console], width: int
) -> None:
    sink, console = live
    console.width = width
    sink.emit(JobStarted("a-very-long-organisation/" + "x" * 100, JOB.variants, 3, JOB.work))
    for block in range(3):
        sink.emit(solved(block))
        sink.emit(solved(block, "awq-w4-g128"))
    lines = frame(sink, width).splitlines()
    assert max(map(len, lines)) <= width
    # Nothing wraps: a blank line, headline, gap, bar, gap, header and two rows.
    assert len(lines) == 8


def test_the_live_view_s_clock_runs_on_between_events(clock: Clock, live: tuple[LiveProgress, Console]) -> None:
    sink, _ = live
    sink.emit(JOB)
    clock.now_s += 7.0
    assert "7 s" in frame(sink)


def test_the_live_view_prints_results_above_itself(clock: Clock, live: tuple[LiveProgress, Console]) -> None:
    sink, console = live
    sink.emit(JOB)
    sink.emit(VariantJudged("gptq-w4-g128", False, ("generation: [bold]repeats\x1b[2J",)))
    assert isinstance(console.file, io.StringIO)
    assert "✗ gptq-w4-g128 failed: generation: [bold]repeats\N{REPLACEMENT CHARACTER}[2J" in console.file.getvalue()


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (VariantJudged("awq-w4-g128", False), "finished in 9 s"),
        (Failed("graph.failed", "a worker died"), "failed after 9 s"),
        (Warned("interrupted"), "stopped after 9 s"),
    ],
)
def test_the_last_frame_says_how_it_ended(
    clock: Clock, live: tuple[LiveProgress, Console], last: VariantJudged | Failed | Warned, said: str
) -> None:
    sink, console = live
    sink.emit(JOB)
    for block in range(6):
        sink.emit(solved(block))
    sink.emit(VariantJudged("gptq-w4-g128", True))
    clock.now_s += 9.0
    sink.emit(last)
    sink.close()
    sink.close()
    assert isinstance(console.file, io.StringIO)
    assert said in console.file.getvalue()


@pytest.mark.parametrize(
    ("mode", "stream", "expected"),
    [
        (ProgressMode.JSON, Terminal(), JsonProgress),
        (ProgressMode.AUTO, io.StringIO(), PlainProgress),
    ],
)
def test_the_sink_fits_the_stream(mode: ProgressMode, stream: io.StringIO, expected: type) -> None:
    assert isinstance(make_sink(mode, stream), expected)


@pytest.mark.parametrize(("terminal", "expected"), [("xterm-256color", LiveProgress), ("dumb", PlainProgress)])
def test_only_a_capable_terminal_gets_the_live_view(
    monkeypatch: pytest.MonkeyPatch, terminal: str, expected: type
) -> None:
    monkeypatch.setenv("TERM", terminal)
    sink: EventSink = make_sink(ProgressMode.AUTO, Terminal())
    sink.close()
    assert isinstance(sink, expected)
