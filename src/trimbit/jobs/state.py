"""The saved state of a resumable training run: parameters, optimizer moments, metadata."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trimbit.errors import NumericsError
from trimbit.jobs.checked import load_tensors, save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW; plain SGD has none


def save_state(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, metadata: Mapping[str, str]
) -> None:
    """Write the state; the file appears complete or not at all."""
    tensors = {name: p.detach() for name, p in parameters.items()}
    parts = _parts(optimizer)
    tensors |= {f"{name}.{part}": optimizer.state[p][part] for name, p in parameters.items() for part in parts}
    save_tensors(path, tensors, metadata)


def load_state(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, str] | None:
    """Restore a state; returns its metadata, or None if there is no state or it is damaged."""
    found = load_tensors(path)
    if found is None:
        return None
    tensors, metadata = found
    for name, p in parameters.items():
        with torch.no_grad():
            p.copy_(tensors[name])
        moments = {part: tensors[f"{name}.{part}"] for part in _parts(optimizer)}
        optimizer.state[p] = {part: own if part == "step" else own.to(p.device) for part, own in moments.items()}
    return metadata


def _parts(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MOMENTS if isinstance(optimizer, torch.optim.AdamW) else ()


def require_finite(what: str, step: int, kept: int, advice: str, **found: Iterable[Tensor]) -> None:
    """Stop a training if any number is not finite; `found` has its loss, gradients, parameters etc. at `step`, by kind.

    Raises:
        NumericsError: naming the step, counted from one, and `kept`, the last step whose state is stored.
    """
    for kind, tensors in found.items():
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            state = f"the state after step {kept} is kept" if kept else "no state was kept yet"
            raise NumericsError(f"a {kind} of step {step} of {what} is not finite; {state}. {advice}")
