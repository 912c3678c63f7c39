"""Arguments of `trimbit compress`, and models that a test may break."""

import shutil

from safetensors.torch import load_file, save_file

from jobs import BUDGET


def copied(job, folder):
    """A model that a test may break."""
    shutil.copytree(job.model, folder / "model")
    return folder / "model"


def changed(model, change):
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def compress(model, out, options, *more, budget=BUDGET):
    return ["compress", model, out, "--budget", budget, *options, *more]
