"""The runner: a result is made once, remembered, resumed, recorded."""

from pathlib import Path
from typing import ClassVar

import pytest

from trimbit.errors import NumericsError
from trimbit.jobs import stages
from trimbit.jobs.cache import Cache
from trimbit.jobs.stages import Runner, Stage, StageKey


class Key(StageKey):
    stage: ClassVar[str] = "squares"
    version: ClassVar[int] = 1
    number: int


class Newer(Key):
    version: ClassVar[int] = 2


class Work:
    """Squares numbers, and counts how often; fails on demand after half of the work."""

    def __init__(self):
        self.made, self.fails = 0, False

    def stage(self, number, kind=Key):
        def make(work):
            self.made += 1
            half = work.folder / "half"
            if not half.exists():
                half.write_text("done")
                if self.fails:
                    raise NumericsError("half way")
            (work.folder / "square").write_text(str(number**2))

        return Stage(
            key=kind(number=number), title="squares", make=make, load=lambda f: int((f / "square").read_text())
        )


@pytest.fixture
def work():
    return Work()


def test_a_result_is_made_once(tmp_path, work):
    first, second = (Runner(Cache(tmp_path)) for _ in range(2))
    assert [first.run(work.stage(3)), first.run(work.stage(3)), second.run(work.stage(3))] == [9, 9, 9]
    assert work.made == 1
    assert second.run(work.stage(4)) == 16
    assert work.made == 2
    assert [record.cached for record in second.records.values()] == [True, False]
    assert {record.stage for record in second.records.values()} == {"squares"}
    assert all(record.seconds >= 0 and record.peak_rss_nbytes > 10**6 for record in second.records.values())


def test_seconds_of_stages_add_up(tmp_path, monkeypatch):
    now, runner = [0.0], Runner(Cache(tmp_path))
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    def stage(number, *inside):
        def make(_):
            now[0] += number
            for one in inside:
                one()
            now[0] += number

        return Stage(key=Key(number=number), title="waits", make=make, load=lambda _: number)

    def store():
        for _ in range(2):
            with runner.store(Key(number=100), "grows"):
                now[0] += 100
                runner.run(stage(1000))

    runner.run(stage(10, lambda: runner.run(stage(1)), store))
    assert [record.seconds for record in runner.records.values()] == [2, 2000, 200, 20]
    assert now == [2222]


def test_keys_depend_on_fields_version_and_libraries(monkeypatch):
    keys = {Key(number=3).digest, Key(number=4).digest, Newer(number=3).digest}
    monkeypatch.setattr(stages, "libraries", lambda: ("torch 0",))
    assert len(keys | {Key(number=3).digest}) == 4


def test_an_interrupted_stage_goes_on_from_what_it_left(tmp_path, work):
    work.fails = True
    with pytest.raises(NumericsError):
        Runner(Cache(tmp_path)).run(work.stage(3))
    runner = Runner(Cache(tmp_path))
    assert not runner.has(work.stage(3))
    assert runner.run(work.stage(3)) == 9
    assert runner.has(work.stage(3))


def test_what_is_forgotten_is_made_again(tmp_path, work):
    runner = Runner(Cache(tmp_path))
    runner.run(work.stage(3))
    runner.forget(work.stage(3))
    assert not runner.has(work.stage(3))
    assert runner.run(work.stage(3)) == 9
    assert work.made == 2


def test_a_damaged_result_is_made_again(tmp_path, work):
    runner = Runner(Cache(tmp_path))
    runner.run(work.stage(3))
    (file,) = Path(tmp_path / "squares").glob("*/square")
    file.write_text("8")
    assert Runner(Cache(tmp_path)).run(work.stage(3)) == 9
    assert work.made == 2


def test_a_store_is_timed_and_adds_up(tmp_path):
    runner = Runner(Cache(tmp_path))
    for name in ("a", "b"):
        with runner.store(Key(number=1), "filling") as found:
            (found.folder / name).write_text("x")
    (record,) = runner.records.values()
    assert (record.stage, record.cached) == ("squares", False)
    assert {file.name for file in (tmp_path / "squares" / record.key).iterdir()} == {"a", "b"}
