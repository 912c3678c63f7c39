"""Actions at the end of a module's import, on modules that are made here; and transformers' Auto classes, for real."""

import importlib
import importlib.util
import subprocess
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader

import pytest

from trimbit.runtime.registration import when_imported

NAME = "late_module"


@pytest.fixture
def late(tmp_path, monkeypatch):
    """A function that writes the module which is imported late; the import system is left as it was."""
    finders = list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text="value = 1\n"):
        (tmp_path / f"{NAME}.py").write_text(text)
        importlib.invalidate_caches()

    write()
    yield write
    sys.modules.pop(NAME, None)
    sys.meta_path[:] = finders


def test_once_and_after_the_module_is_whole(late):
    before, seen = list(sys.meta_path), []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    importlib.import_module("json")
    assert seen == []
    module = importlib.import_module(NAME)
    assert seen == [1]
    assert sys.meta_path == before
    assert type(module.__spec__.loader) is type(module.__loader__) is SourceFileLoader
    late("value = 2  # longer\n")
    assert importlib.reload(module).value == 2
    assert seen == [1]


def test_at_once_if_it_is_imported(late):
    importlib.import_module(NAME)
    before, seen = list(sys.meta_path), []
    when_imported(NAME, lambda: seen.append(1))
    assert seen == [1]
    assert sys.meta_path == before


@pytest.mark.usefixtures("late")
def test_asked_twice_it_acts_once():
    seen = []
    when_imported(NAME, lambda: seen.append("first"))
    when_imported(NAME, lambda: seen.append("second"))
    importlib.import_module(NAME)
    assert seen == ["first"]


def test_a_module_that_replaces_itself_as_transformers_does(late):
    late("import sys, types\nother = types.ModuleType(__name__)\nother.value = 3\nsys.modules[__name__] = other\n")
    seen = []
    when_imported(NAME, lambda: seen.append(importlib.import_module(NAME).value))
    assert importlib.import_module(NAME).value == 3
    assert seen == [3]


def test_other_threads_wait_until_it_has_acted(late):
    late("import time\ntime.sleep(0.1)\n")
    acted, seen = threading.Event(), []

    def act():
        threading.Event().wait(0.2)
        acted.set()

    def read():
        importlib.import_module(NAME)
        seen.append(acted.is_set())

    when_imported(NAME, act)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4


def test_a_failed_import_is_raised_and_the_next_one_acts(late):
    seen = []
    when_imported(NAME, lambda: seen.append(1))
    late("raise ImportError('half installed')\n")
    with pytest.raises(ImportError, match="half installed"):
        importlib.import_module(NAME)
    assert seen == []
    late("value = 1  # mended\n")
    importlib.import_module(NAME)
    assert seen == [1]


@pytest.mark.usefixtures("late")
def test_a_failed_action_is_raised_and_the_next_import_acts():
    seen = []

    def act():
        seen.append(1)
        if len(seen) == 1:
            raise RuntimeError("not this time")

    when_imported(NAME, act)
    with pytest.raises(RuntimeError, match="not this time"):
        importlib.import_module(NAME)
    assert NAME not in sys.modules
    importlib.import_module(NAME)
    importlib.import_module(NAME)
    assert seen == [1, 1]


class SearchesAgain(MetaPathFinder):
    """As other packages' import hooks do."""

    searching = False

    def find_spec(self, name, path=None, target=None):
        if name != NAME or self.searching:
            return None
        self.searching = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.searching = False


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("place", [0, 1])
def test_beside_another_hook(place):
    seen = []
    when_imported(NAME, lambda: seen.append(1))
    sys.meta_path.insert(place, SearchesAgain())
    module = importlib.import_module(NAME)
    assert seen == [1]
    assert type(module.__spec__.loader) is SourceFileLoader


ORDERS = {
    "trimbit first": """
import sys
import trimbit
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoModelForCausalLM
waiting = [name for name in sys.modules if name.startswith(("trimbit.model", "trimbit.kernels"))]
assert not waiting, waiting  # they import transformers, too: two threads could wait for each other
""",
    "transformers first, and both again": """
import importlib
import transformers
from transformers import AutoModelForCausalLM
import trimbit
importlib.reload(trimbit)
importlib.reload(transformers)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_compressed_directory_is_loaded_in_any_order_of_imports(compressed, order):
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(compressed[0])!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", ORDERS[order] + load], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM"]
