"""What the package offers: loaded when it is used, and known to type checkers."""

import ast
from importlib.metadata import version
from pathlib import Path

import pytest

import trimbit
from trimbit.evaluate.perplexity import evaluate

ROOT = Path(trimbit.__file__).parent


def test_functions_are_those_of_the_rooms():
    assert trimbit.eval is evaluate
    assert trimbit.__version__ == version("trimbit")
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = trimbit.nonesuch


@pytest.mark.parametrize("name", trimbit._PUBLIC)
def test_each_name_is_listed_typed_and_hidden_by_no_room(name):
    """Importing a room sets it as an attribute of the package: a function of the same name would be gone."""
    assert callable(getattr(trimbit, name))
    assert name in trimbit.__all__
    assert name in dir(trimbit)
    assert not (ROOT / name).exists()
    assert not (ROOT / f"{name}.py").exists()
    tree = ast.parse((ROOT / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {
        one.asname or one.name
        for block in blocks
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for one in node.names
    }
    assert name in typed


def test_type_checkers_read_the_annotations():
    assert (ROOT / "py.typed").is_file()
