"""Cells resume, an interrupted write loses nothing, tables lie between their markers, digests follow the code."""

import json
import runpy
import subprocess
import sys
from multiprocessing import get_context

import pytest
import torch

from harness import cells, cli
from harness.bench import Bench
from harness.cells import Cell, Results, seeded
from harness.models import take_off_grid
from harness.origin import NOT_RECORDED, code_digest, file_digest, hardware_of, origins
from harness.process import Timed, measured
from harness.tables import between, table, write_parts
from tiny import VOCAB, tiny_model
from trimbit.jobs.hardware import hardware

OLD = {"hardware": "AMD EPYC", "threads": 2, "torch": "2.13.0"}  # as earlier code stored a cell


def counting(key, calls, **fields):
    def run():
        calls.append(key)
        return {"kl": 0.5}

    return Cell(key=key, run=run, minutes=1, **fields)


def test_a_cell_is_run_once_and_names_its_origin(tmp_path):
    text, calls = tmp_path / "text.raw", []
    text.write_text("some text", encoding="utf-8")
    cell = counting("a/b", calls, seed=3, context=128, texts=(text,))
    for _ in range(2):
        results = Results(tmp_path / "results" / "own.json")
        if results.missing(cell):
            results.run(cell)
    assert calls == ["a/b"]
    found = Results(tmp_path / "results" / "own.json").read()["a/b"]
    assert found["kl"] == 0.5
    assert (found["seed"], found["context"], found["text_digests"]) == (3, 128, {"text.raw": file_digest(text)})
    assert hardware_of(found) == hardware()
    assert found["versions"]["torch"] == torch.__version__
    assert found["code"] == results.code
    assert found["seconds"] >= 0


def test_a_failing_cell_leaves_the_others(tmp_path):
    results = Results(tmp_path / "own.json")
    results.run(counting("first", []))

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        results.run(Cell(key="second", run=fails, minutes=1))
    assert list(results.read()) == ["first"]


def test_an_interrupted_write_loses_nothing(tmp_path, monkeypatch):
    results = Results(tmp_path / "own.json")
    results.run(counting("first", []))
    before = results.path.read_bytes()

    def torn(path, write):
        temporary = path.with_suffix(".tmp")
        write(temporary)
        temporary.write_bytes(temporary.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "save_atomically", torn)
    with pytest.raises(KeyboardInterrupt):
        results.run(counting("second", []))
    assert results.path.read_bytes() == before
    monkeypatch.undo()
    results.run(counting("second", []))  # the lock is free again
    assert sorted(results.read()) == ["first", "second"]


def _store(path, names):
    results = Results(path)
    for name in names:
        results.store(name, {"kl": 0.0})


def test_processes_share_a_file(tmp_path):
    path = tmp_path / "own.json"
    names = [[f"{process}/{at}" for at in range(20)] for process in range(2)]
    workers = [get_context("fork").Process(target=_store, args=(path, own)) for own in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(Results(path).read()) == sorted(name for own in names for name in own)
    assert list(tmp_path.iterdir()) == [path]


def test_stale_cells_are_those_of_other_code(tmp_path):
    results, cell = Results(tmp_path / "own.json"), counting("a", [])
    results.store("a", OLD)
    assert not results.missing(cell)
    assert results.missing(cell, stale=True)
    results.run(cell)
    assert not results.missing(cell, stale=True)


def test_a_cell_may_not_hide_its_origin(tmp_path):
    results = Results(tmp_path / "own.json")
    with pytest.raises(AssertionError, match="seed"):
        results.run(Cell(key="a", run=lambda: {"seed": 1}, minutes=1))
    assert results.read() == {}


def test_the_digest_changes_with_code_and_recipes_alone(tmp_path):
    code = tmp_path / "a.py"
    (tmp_path / "recipes").mkdir()
    code.write_text("def f():\n    return 1\n", encoding="utf-8")
    (tmp_path / "recipes" / "own.yaml").write_text("x: 1", encoding="utf-8")
    seen = [code_digest(tmp_path)]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"0")
    assert code_digest(tmp_path) == seen[0]
    code.write_text('"""A."""\n\ndef f():\n    """F."""\n    return (\n        1  # why\n    )\n', encoding="utf-8")
    assert code_digest(tmp_path) == seen[0]
    for change in (
        lambda: (tmp_path / "a.py").write_text("x = 2", encoding="utf-8"),
        lambda: (tmp_path / "recipes" / "own.yaml").write_text("x: 2", encoding="utf-8"),
        lambda: (tmp_path / "a.py").rename(tmp_path / "b.py"),
        lambda: (tmp_path / "c.py").touch(),
    ):
        change()
        seen.append(code_digest(tmp_path))
    assert len(set(seen)) == len(seen)


def test_keys_of_seeds():
    assert seeded("a/b", 0) == "a/b"
    assert seeded("a/b", 2) == "a/b/seed 2"


def test_origins_say_what_was_not_recorded():
    new = {"hardware": hardware().model_dump(mode="json") | {"instruction_sets": ["avx2", "avx512f"]}, "code": "c0de"}
    rows = origins({"a": OLD, "b": OLD, "c": new})
    assert rows[0] == ("AMD EPYC", NOT_RECORDED, "2", NOT_RECORDED, "2")
    assert rows[1][1:] == ("avx2, avx512f", str(torch.get_num_threads()), "c0de", "1")


def test_tables_lie_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- one -->\nold\n<!-- end of one -->\nbelow\n", encoding="utf-8")
    for _ in range(2):
        write_parts(page, {"one": table(["a", "b"], [["1", "2"]])})
        assert page.read_text(encoding="utf-8") == (
            "above\n<!-- one -->\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<!-- end of one -->\nbelow\n"
        )
    assert table(["a", "b"], [], tight=True) == ["| a | b |", "|---|---|"]


@pytest.mark.parametrize("page", ["no markers", "<!-- one --> but no end"])
def test_a_page_without_markers_is_an_error(page):
    with pytest.raises(ValueError, match=r"has no <!-- (end of )?one -->"):
        between(page, "one", "text")


def test_stages_are_timed_by_title():
    timed = Timed()
    for _ in range(2):
        with timed.stage("a") as progress:
            progress(1, 1)
    assert list(timed.seconds) == ["a"]
    assert timed.seconds["a"] >= 0


def test_the_memory_of_another_process_is_its_own():
    size = 100 * 2**20
    held = b"0" * (3 * size)  # of this process, which must not count
    _, small = measured(["-c", "pass"])
    _, large = measured(["-c", f"x = b'0' * {size}"])
    assert len(held) > large - small > 0.9 * size
    with pytest.raises(subprocess.CalledProcessError):
        measured(["-c", "raise SystemExit(3)"])


def test_off_the_grid_the_function_is_the_same():
    model, tokens = tiny_model("llama"), torch.arange(VOCAB)[None]
    with torch.no_grad():
        before, weight = model(tokens).logits, model.model.layers[0].mlp.down_proj.weight.clone()
        take_off_grid(model, 0)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
    ratio = model.model.layers[0].mlp.down_proj.weight / weight
    assert ratio.std(0).max() < 1e-5  # one factor for each input channel
    assert ratio.mean(0).std() > 0.1
    with pytest.raises(ValueError, match="gemma2"):
        take_off_grid(tiny_model("gemma2"), 0)


@pytest.fixture
def listed(capsys):
    def run(*arguments):
        cli.main("doc", [*arguments, "--list"])
        return capsys.readouterr().out

    return run


def test_cells_are_chosen_by_pattern_and_seed(listed):
    keys = [
        line.split("  ")[-1] for line in listed("main.budgets", "--only", "*/45MB*", "--seeds", "0", "2").split("\n")
    ]
    assert [key for key in keys if key.startswith("budget/")] == [
        f"budget/{recipe}/45MB{seed}"
        for seed in ("", "/seed 2")
        for recipe in ("knapsack", "knapsack-nopruning", "uniform-gptq")
    ]


def test_what_is_run_alone_is_run_where_it_is_named(listed):
    assert "full/" not in listed("toga")
    assert "full/W1.6A16/0" in listed("toga.full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["main.nothing", "--list"], "main.rounding"), (["other", "--list"], "no experiment"), (["main"], "--data")],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main("doc", arguments)
    assert message in capsys.readouterr().err


def test_the_command_line_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(cli, "write_page", lambda group, stored: calls.append((group, sorted(stored))))
    own = counting("a", calls)
    monkeypatch.setattr(cli, "chosen", lambda name, bench, options: iter([own]))
    for _ in range(2):
        cli.main("doc", ["main.job", "--data", str(tmp_path)])
    assert calls == ["a", ("main", ["a"]), ("main", ["a"])]
    assert json.loads((tmp_path / "results" / "main.json").read_text())["a"]["kl"] == 0.5
    assert "about 1 minutes" in capsys.readouterr().out


def test_the_model_off_its_grid_appears_whole(tmp_path, monkeypatch):
    def fails(source, out, seed):
        out.mkdir(parents=True)
        (out / "half").touch()
        raise KeyboardInterrupt

    bench = Bench(source=tmp_path, data=tmp_path, work=tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr("harness.bench.write_off_grid", fails)
        with pytest.raises(KeyboardInterrupt):
            bench.original(0)
    made = []

    def makes(source, out, seed):
        out.mkdir()
        made.append(seed)

    monkeypatch.setattr("harness.bench.write_off_grid", makes)
    assert bench.original(0) == bench.original(0)
    assert made == [0]
    assert list(bench.original(0).iterdir()) == []


def test_the_script_lists_cells(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "main.job", "--list"])
    runpy.run_path(str(cli.BENCHMARKS / "run.py"), run_name="__main__")
    assert "job/demo/72MB" in capsys.readouterr().out
