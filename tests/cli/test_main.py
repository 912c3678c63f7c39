"""The command line: its commands and options, help, version and recipes."""

import pytest
import typer
import yaml
from typer.testing import CliRunner

import trimbit
from trimbit.cli import main as cli
from trimbit.pipeline.recipes import load_recipe, names
from trimbit.pipeline.steps import module_of

SEARCHING = ["--budget", "--calibration", "--device", "--dry-run", "--recipe", "--seed", "--set"]


OPTIONS = {
    "compress": (["model", "out"], SEARCHING),
    "plan": (["model", "out"], SEARCHING),
    "apply": (["model", "plan_file", "out"], ["--calibration", "--device", "--recipe", "--seed", "--set"]),
    "eval": (
        ["model"],
        [
            "--against",
            "--context",
            "--device",
            "--dtype",
            "--json",
            "--limit",
            "--task-data",
            "--tasks",
            "--text",
            "--windows",
        ],
    ),
    "show": (["path"], ["--context", "--json"]),
    "recipes": (["name"], ["--all", "--set"]),
    "cache": ([], []),
    "cache show": ([], ["--json"]),
    "cache prune": ([], ["--max-size", "--older-than"]),
    "cache clear": ([], []),
}


def test_commands_and_options_are_frozen():
    commands = dict(typer.main.get_command(cli.app).commands)
    commands |= {f"cache {name}": command for name, command in commands["cache"].commands.items()}
    found = {}
    for name, command in commands.items():
        arguments = [p.name for p in command.params if p.param_type_name == "argument"]
        options = [opt for p in command.params if p.param_type_name == "option" for opt in (*p.opts, *p.secondary_opts)]
        found[name] = (arguments, sorted(options))
    assert found == OPTIONS


@pytest.mark.parametrize("command", [[], *(name.split() for name in OPTIONS)])
def test_help(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, trimbit.__version__)


def test_recipes(run):
    code, out, _ = run("recipes")
    assert code == 0
    for name in names():
        assert name in out


@pytest.mark.parametrize("name", names())
def test_a_recipe_spelled_out_is_the_recipe(run, tmp_path, name):
    """With every parameter; as a file it is the same one."""
    code, out, err = run("recipes", name, "--all")
    assert code == 0, err
    (tmp_path / "own.yaml").write_text(out)
    assert run("recipes", tmp_path / "own.yaml", "--all")[1] == out
    (tmp_path / "short.yaml").write_text(run("recipes", name)[1])
    assert run("recipes", tmp_path / "short.yaml", "--all")[1] == out
    fields = yaml.safe_load(out)
    assert fields["search"]["params"].keys() == module_of("search", load_recipe(name).search).Config.model_fields.keys()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["compress"], "Missing argument"),
        (["compress", "a"], "Missing argument 'out'"),
        (["compress", "a", "b", "--budget", "1MB", "--bugdet", "2"], "No such option"),
        (["squeeze"], "No such command 'squeeze'"),
        (["compress", "a", "b", "--budget", "1MB", "--seed", "x"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_arguments(refused, arguments, word):
    refused(*arguments, words=[word], code=2)
