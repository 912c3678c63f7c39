"""Arguments and options shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

CONTEXT = 2048  # tokens per window, and in the KV caches whose size is shown

Model = Annotated[Path, typer.Argument(help="a directory with config.json and safetensors, or a .gguf file")]
Out = Annotated[Path, typer.Argument(help="the directory or file to write")]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", help="limit on the weight files: 45MB, 45MiB, 2.5bpw or 0.2x; default: the recipe's own"),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="the name of a recipe, or a .yaml file")]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="`self` (sampled from the model), `builtin` (comes with trimbit), or a .txt, .md, .raw, .jsonl file (.gz)",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a parameter of the recipe: stage.parameter=value")
]
Seed = Annotated[int, typer.Option("--seed", help="seed of everything random")]
Device = Annotated[str, typer.Option("--device", help="auto (the GPU if there is one), cpu, cuda or cuda:1")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check everything and estimate size, memory and time; write nothing")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
