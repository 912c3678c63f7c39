"""Commands that only read JSON and YAML do not wait for torch and transformers."""

import subprocess
import sys

import pytest

from results import write_result

SCRIPT = """
import sys
sys.argv = ["trimbit", *sys.argv[1:]]
from trimbit.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = sorted({"torch", "transformers", "scipy", "numpy"} & sys.modules.keys())
assert not heavy, heavy
"""

COMMANDS = (
    ["--version"], ["--help"], ["compress", "--help"], ["recipes"], ["recipes", "knapsack"],
    ["show", "out"], ["show", "out", "--json"], ["cache", "show"], ["cache", "prune", "--older-than", "1"],
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_torch_and_no_transformers(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "cache"))
    write_result(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
