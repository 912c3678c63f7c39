"""Lines of progress by a clock that a test moves."""

import io
import sys

import pytest

from trimbit.cli import progress
from trimbit.cli.progress import Bars, Lines, duration, reporter


class Log:
    """Lines, and the time that the test says it is."""

    def __init__(self):
        self.now, self.lines = 0.0, []
        self.reporter = Lines(self.lines.append, lambda: self.now)

    def advance(self, stage, seconds, done, total):
        self.now += seconds
        stage(done, total)


@pytest.fixture
def log():
    return Log()


def test_the_time_left_counts_from_the_first_report(log):
    """What a stage does before it counts, such as to make candidates, says nothing about the rest."""
    with log.reporter.stage("damage") as stage:
        log.advance(stage, 50, 0, 100)
        log.advance(stage, 2, 1, 100)
        log.advance(stage, 30, 2, 100)
    assert log.lines[1:-1] == ["damage: 0 of 100 (0 %)", "damage: 2 of 100 (2 %), about 26 min left"]  # 16 s x 98


def test_a_long_stage_speaks_every_30_seconds(log):
    with log.reporter.stage("damage") as stage:
        assert log.lines == ["damage: started"]
        for step in range(1, 1001):
            log.advance(stage, 7, step, 1000)
    between = log.lines[1:-1]
    assert between[0] == "damage: 5 of 1000 (0 %), about 116 min left"  # 7 s x 995
    assert len(between) == 1000 // 5 - 1
    assert log.lines[-1] == "damage: done in 7000.0 s"


def test_a_short_stage_speaks_every_tenth(log):
    with log.reporter.stage("stats") as stage:
        for step in range(1, 101):
            log.advance(stage, 0.2, step, 100)
    assert log.lines == [
        "stats: started",
        *(f"stats: {10 * at} of 100 ({10 * at} %), about {20 - 2 * at} s left" for at in range(1, 10)),
        "stats: done in 20.0 s",
    ]


def test_a_stage_of_a_moment_says_only_that_it_was(log):
    with log.reporter.stage("tables") as stage:
        for step in range(1, 101):
            log.advance(stage, 0.001, step, 100)
    assert log.lines == ["tables: started", "tables: done in 0.1 s"]


def test_a_stage_that_goes_on_counts_only_what_it_did_itself(log):
    with log.reporter.stage("masks") as stage:
        log.advance(stage, 40, 901, 1000)
        log.advance(stage, 40, 911, 1000)
    assert log.lines[1] == "masks: 901 of 1000 (90 %)"
    assert log.lines[2] == "masks: 911 of 1000 (91 %), about 6 min left"  # 4 s x 89


def test_a_stage_that_counts_twice(log):
    with log.reporter.stage("rounds") as stage:
        log.advance(stage, 40, 9, 10)
        log.advance(stage, 40, 1, 10)
        log.advance(stage, 40, 2, 10)
    assert log.lines[2:4] == ["rounds: 1 of 10 (10 %)", "rounds: 2 of 10 (20 %), about 5 min left"]


def test_a_stage_in_a_stage_is_indented(log):
    with log.reporter.stage("search"), log.reporter.stage("refit"):
        log.now = 3
    with log.reporter.stage("next"):
        pass
    assert log.lines == [
        "search: started", "  refit: started", "  refit: done in 3.0 s", "search: done in 3.0 s",
        "next: started", "next: done in 0.0 s",
    ]  # fmt: skip


def test_a_stage_that_fails_is_not_done(log):
    def stop():
        with log.reporter.stage("search"):
            log.now = 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert log.lines == ["search: started", "search: stopped after 5.0 s"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7200.0, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_go_to_stderr_at_once(capsys):
    with Lines().stage("search"):
        assert capsys.readouterr() == ("", "search: started\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term", "kind"), [(Terminal, "xterm", Bars), (Terminal, "dumb", Lines), (io.StringIO, "xterm", Lines)]
)
def test_bars_only_where_they_can_be_redrawn(monkeypatch, stream, term, kind):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it: rich then takes a pipe for a terminal
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(progress, "stderr", progress.bars.Console(stderr=True))
    assert type(reporter()) is kind
