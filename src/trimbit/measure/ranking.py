"""The order in which channels and KV groups go: a criterion run over every unit of a model."""

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.calibrate.gradients import coupled, sweep
from trimbit.calibrate.stats import Stats
from trimbit.errors import RecipeError
from trimbit.jobs.progress import Progress
from trimbit.model.forward.stream import BlockStream

Rankings = dict[str, tuple[int, ...]]  # dim -> its indices, the one to keep longest first


def by_moments(
    module: ModuleType, config: Any, stream: BlockStream, stats: Stats, progress: Progress,  # noqa: ANN401
) -> Rankings:  # fmt: skip
    """Rank by what flows into each unit's output weight."""
    found: Rankings = {}
    layout = stream.layout
    units = [unit for unit in layout.units.values() if unit.dim is not None]
    for at, unit in enumerate(units):
        assert unit.dim is not None
        assert unit.out_weight is not None
        weight = layout.weights[unit.out_weight]
        w = stream.checkpoint.tensor(f"{weight.name}.weight").to(stream.device, torch.float32)
        moments = stats.moments(weight.site).to(stream.device)
        found[unit.dim] = _order(module.score(w, moments, weight.cols // unit.size, config))
        progress(at + 1, len(units))
    return found


def by_gradients(
    module: ModuleType, config: Any, stream: BlockStream, tokens: Int[Tensor, "rows length"], progress: Progress  # noqa: ANN401
) -> Rankings:  # fmt: skip
    """Rank by gradients of the loss on the first `samples` rows, cut to `length` tokens.

    Raises:
        RecipeError: if there are fewer rows or tokens than the criterion asks for.
    """
    layout = stream.layout
    require_samples(config, *tokens.shape)
    found: Rankings = {}
    for index, gradients in sweep(stream, tokens[: config.samples, : config.length], progress):
        for unit in layout.units.values():
            if unit.block == index and unit.dim is not None:
                found[unit.dim] = _order(module.score(coupled(layout, unit, gradients), unit.size, config))
    return found


def require_samples(config: Any, rows: int, length: int) -> None:  # noqa: ANN401
    """Refuse a criterion that asks for more text than there is.

    Raises:
        RecipeError: naming both.
    """
    if rows < config.samples or length < config.length:
        raise RecipeError(
            f"the criterion asks for {config.samples} samples of {config.length} tokens, "
            f"calibration has {rows} rows of {length}"
        )


def _order(score: Float[Tensor, " members"]) -> tuple[int, ...]:
    return tuple(score.argsort(descending=True, stable=True).tolist())
