"""The state of a training that may be broken off: its parameters, AdamW's moments if it has any, and what is told."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimbit.errors import ArtifactError, NumericsError
from trimbit.jobs.cache import save_atomically

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW; plain SGD has none


def save_state(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, metadata: Mapping[str, str]
) -> None:
    """Write the state; the file appears whole."""
    tensors = {name: p.detach() for name, p in parameters.items()}
    parts = _parts(optimizer)
    tensors |= {f"{name}.{part}": optimizer.state[p][part] for name, p in parameters.items() for part in parts}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_atomically(path, lambda beside: save_file(whole, beside, dict(metadata)))


def load_state(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    what: str,
    belongs: str | None = None,
) -> dict[str, str] | None:
    """Take a state up; returns what is told beside it, or None where there is no state.

    Raises:
        ArtifactError: if it has other parameters, or is told to belong to something else; `what` names the training.
    """
    if not path.exists():
        return None
    metadata, parts = read_metadata(path), _parts(optimizer)
    with safe_open(path, framework="pt") as file:
        want = {*parameters, *(f"{name}.{part}" for name in parameters for part in parts)}
        if metadata.get("belongs") != belongs or set(file.keys()) != want:
            raise ArtifactError(f"{path}: the stored state of another {what}; remove it and run again")
        for name, p in parameters.items():
            with torch.no_grad():
                p.copy_(file.get_tensor(name))
            own = {part: file.get_tensor(f"{name}.{part}") for part in parts}
            optimizer.state[p] = {part: kept if part == "step" else kept.to(p.device) for part, kept in own.items()}
    return metadata


def _parts(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MOMENTS if isinstance(optimizer, torch.optim.AdamW) else ()


def require_finite(what: str, step: int, kept: int, advice: str, **found: Iterable[Tensor]) -> None:
    """Stop a training whose numbers left the finite ones; `found` are its loss, gradients or parameters after `step`.

    Raises:
        NumericsError: says the step, counted from one, and the last one whose state is stored, `kept`.
    """
    for kind, tensors in found.items():
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            state = f"the state after step {kept} is kept" if kept else "no state was kept yet"
            raise NumericsError(f"a {kind} of step {step} of {what} is not finite; {state}. {advice}")


def read_metadata(path: Path) -> dict[str, str]:
    """What is told beside a state."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
