"""The three sinks, with a clock that the tests turn."""

from __future__ import annotations

import io
import json
import re
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
    WorkersReady,
    WorkersStarting,
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


def solved(block: int, variant: str = "gptq-w4-g128", seconds: float = 1.0) -> StageFinished:
    return StageFinished(Phase.SOLVE, seconds, 1.0, block=block, variant=variant, group="mlp.down_proj", loss=0.0123)


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
    sink.emit(JobStarted("acme/tiny", JOB.variants, 12, (PhaseWork(Phase.SOLVE, 12, 12.0),)))
    for block in range(12):
        clock.now_s += 2.0
        sink.emit(solved(block, seconds=2.0))
    assert stream.getvalue().splitlines() == [
        "[0:00:00] acme/tiny: 12 blocks, variants gptq-w4-g128, awq-w4-g128",
        "[0:00:02] solve 1/12, gptq-w4-g128, block 0 mlp.down_proj, loss 0.0123",
        "[0:00:08] solve 4/12, gptq-w4-g128, block 3 mlp.down_proj, loss 0.0123",
        "[0:00:14] solve 7/12, gptq-w4-g128, block 6 mlp.down_proj, loss 0.0123, about 10 s left",
        "[0:00:20] solve 10/12, gptq-w4-g128, block 9 mlp.down_proj, loss 0.0123, about 4 s left",
        "[0:00:24] solve 12/12, gptq-w4-g128, block 11 mlp.down_proj, loss 0.0123",
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
        assert ("planning" if done_bytes == 16 else f"source files {done_bytes} GB of 16 GB") in frame(live[0])
    assert stream.getvalue().splitlines() == [
        "[0:00:00] source files 4 GB of 16 GB",
        "[0:00:06] source files 16 GB of 16 GB",
    ]


def test_the_start_of_workers_is_told_before_there_is_a_plan(clock: Clock, live: tuple[LiveProgress, Console]) -> None:
    stream = io.StringIO()
    plain = PlainProgress(stream, clock)
    said = []
    for event in (
        SourceAdvanced("model.safetensors", 9, 9),
        WorkersStarting(2),
        WorkersReady(1, 2),
        JOB,
        WorkersReady(2, 2),
    ):
        plain.emit(event)
        live[0].emit(event)
        clock.now_s += 4.0
        said.append(" ".join(frame(live[0]).splitlines()[1].split()))
    assert stream.getvalue().splitlines()[1:4] == [
        "[0:00:04] starting 2 workers",
        "[0:00:08] 1 of 2 workers ready",
        "[0:00:12] acme/tiny: 3 blocks, variants gptq-w4-g128, awq-w4-g128",
    ]
    assert said == [
        "planning 4 s",
        "starting 2 workers 8 s",
        "starting 2 workers 12 s",
        "acme/tiny 16 s · 1 of 2 workers",
        "acme/tiny 20 s",
    ]


def test_what_an_earlier_run_did_is_shown_as_done_in_every_row(
    clock: Clock, live: tuple[LiveProgress, Console]
) -> None:
    sink, _ = live
    work = (PhaseWork(Phase.SOLVE, 6, 6.0), PhaseWork(Phase.PACK, 6, 6.0), PhaseWork(Phase.EVALUATE, 2, 2.0))
    sink.emit(JobStarted("acme/tiny", JOB.variants, 3, work))
    for block in range(3):
        for variant in JOB.variants:
            for phase, error in ((Phase.PACK, 0.1), (Phase.SOLVE, None)):
                sink.emit(
                    StageFinished(
                        phase, 0.0, 1.0, block, variant, relative_error=error and error + 0.01 * block, reused=True
                    )
                )
    lines = [" ".join(line.split()) for line in frame(sink).splitlines()]
    assert [line.split()[-3:] for line in lines[3:5]] == [["6/6", "6", "reused"]] * 2
    assert lines[8:] == [f"{variant} 3/3 - 12 % - evaluating" for variant in JOB.variants]


def test_the_place_in_the_blocks_never_jumps_back(clock: Clock, live: tuple[LiveProgress, Console]) -> None:
    sink, _ = live
    work = (PhaseWork(Phase.CALIBRATE, 9, 9.0), PhaseWork(Phase.EVALUATE, 9, 9.0))
    sink.emit(JobStarted("acme/tiny", JOB.variants, 3, work))
    notes = []
    for phase, block in ((Phase.CALIBRATE, 0), (Phase.CALIBRATE, 2), (Phase.CALIBRATE, 1), (Phase.EVALUATE, 2)):
        sink.emit(StageFinished(phase, 1.0, 1.0, block=block))
        notes.append([re.findall(r"\d/9.*", line)[0].split() for line in frame(sink).splitlines()[3:5]])
    assert notes == [
        [["1/9", "block", "1/3"], ["0/9"]],
        [["2/9", "block", "3/3"], ["0/9"]],
        [["3/9", "block", "3/3"], ["0/9"]],
        [["3/9", "block", "3/3"], ["1/9"]],
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
    sink.emit(WorkersReady(1, 1))
    sink.emit(
        JobStarted("acme/tiny", JOB.variants, 3, (PhaseWork(Phase.SOLVE, 30, 30.0), PhaseWork(Phase.PACK, 3, 0.3)))
    )
    for _ in range(6):
        clock.now_s += 10.0
        sink.emit(StageFinished(Phase.SOLVE, 10.0, 1.0, 0, "gptq-w4-g128", loss=0.0123, relative_error=0.0412))
    sink.emit(StageFinished(Phase.PACK, 0.1, 0.1, 0, "gptq-w4-g128", relative_error=0.0412))
    sink.emit(Degraded("gptq-w4-g128", "m", "r"))
    lines = [" ".join(line.split()) for line in frame(sink).splitlines()]
    assert lines[1].startswith("acme/tiny 1 min 00 s · about 3 min 5")
    assert lines[3].startswith("solve")
    assert lines[3].endswith("6/30 block 1/3")
    assert lines[7:] == [
        "gptq-w4-g128 1/3 0.0123 4.12 % - quantizing, 1 degraded",
        "awq-w4-g128 0/3 - - - waiting",
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
