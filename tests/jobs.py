"""A whole job on a tiny llama: model, text and a recipe with small numbers, each made once a test run."""

import random
from importlib.resources import files
from pathlib import Path

import yaml

from tiny import SPECIAL, VOCAB, save_tiny, tiny_model

RECIPES = Path(str(files("trimbit"))) / "recipes"
BUDGET = "30kB"


def write_text(path: Path, tokens: int, seed: int = 0) -> None:
    """Random words of the tiny vocabulary."""
    rng = random.Random(seed)
    path.write_text(" ".join(f"w{rng.randrange(len(SPECIAL), VOCAB)}" for _ in range(tokens)), encoding="utf-8")


def write_recipe(path: Path) -> None:
    """The knapsack's recipe for a model of 3 blocks of width 48."""
    fields = yaml.safe_load((RECIPES / "knapsack.yaml").read_text(encoding="utf-8"))
    fields["calibration"] = {"rows": 12, "length": 32, "held_out": 2}
    fields["measure"] = {"rows": 2, "length": 16, "draws": 4}
    formats = ["uint2g32", "int4g32", "uint8row"]
    fields["space"] |= {
        "formats": formats,
        "embedding_formats": formats,
        "widths": [1.0, 0.5, 0.0],
        "channel_multiple": 16,
    }
    fields["search"] = {"name": "knapsack", "params": {"plans": 3}}
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")


class Job:
    """Paths of what a job needs."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "original"
        self.text = folder / "text.txt"
        self.recipe = folder / "own.yaml"
        save_tiny(tiny_model("llama").bfloat16(), self.model)
        (self.model / "LICENSE").write_text("as you like", encoding="utf-8")
        write_text(self.text, 1500)
        write_recipe(self.recipe)
