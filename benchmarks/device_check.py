"""Run one job on two devices and compare: the stages' seconds, the plan, the weights and the KL.

`python benchmarks/device_check.py MODEL --device cuda` takes a few minutes; the exit status says whether both agree.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.tables import table
from trimbit.pipeline.flow import compress
from trimbit.pipeline.preflight import open_job
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan

KL_APART = 0.05  # share of the KL by which the two may differ: sums are taken in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a job made on one device, and the seconds of its stages."""

    plan: Plan
    weights: dict[str, Tensor]
    seconds: dict[str, float]

    @property
    def kl(self) -> float:
        """The reported KL."""
        assert self.plan.found_by.measured_damage is not None
        return self.plan.found_by.measured_damage


def make(given: argparse.Namespace, device: str, folder: Path) -> Made:
    """Run the job on a device, with an empty cache."""
    job = open_job(
        given.model, load_recipe(given.recipe), calibration=given.calibration, cache=folder / "cache", device=device
    )
    plan = compress(job, Budget.parse(given.budget), folder / "out")
    record = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    seconds = {one["stage"]: one["seconds"] for one in record["stages"]}
    return Made(plan=plan, weights=load_file(folder / "out" / "model.safetensors"), seconds=seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print what was found; 1 if the KLs are too far apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--budget", default="72MB")
    parser.add_argument("--calibration", default="builtin")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        one, other = (make(given, device, Path(scratch) / f"{at}") for at, device in enumerate(("cpu", given.device)))
    rows = [[stage, f"{spent:.1f}", f"{other.seconds.get(stage, 0.0):.1f}"] for stage, spent in one.seconds.items()]
    print("\n".join(table(["seconds", "cpu", given.device], rows, tight=True)))
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    same = sum(name in other.weights and torch.equal(own, other.weights[name]) for name, own in one.weights.items())
    print(f"KL {one.kl:.4f} and {other.kl:.4f}; {same} of {len(one.weights)} tensors are the same to the bit")
    print("the plans are the same" if one.plan.content == other.plan.content else "the plans differ")
    return int(abs(other.kl - one.kl) > KL_APART * one.kl)


if __name__ == "__main__":
    sys.exit(main())
