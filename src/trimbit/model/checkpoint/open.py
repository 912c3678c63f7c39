"""Open an original causal language model, and fill modules with its weights, tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor, nn

from trimbit.model.checkpoint.checkpoint import PICKLES, Checkpoint, bad, check_finite
from trimbit.model.checkpoint.gguf import open_gguf
from trimbit.model.checkpoint.safetensors_dir import open_directory


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open an uncompressed causal language model from disk; the network is never used.

    Only headers are read; but if the config ties the head and it is stored anyway, head and embedding are compared.

    Args:
        path: a directory with config.json and safetensors, a `.gguf` file, or a directory whose
            only weights are one `.gguf` file.

    Raises:
        CheckpointError: if it is missing, incomplete, damaged, pickled, already quantised or compressed, or
            needs remote code.
        LayoutError: if transformers does not know its model type, naming the nearest known family.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise bad(path, "does not exist", "models are not downloaded from the hub: give a local directory")
    if path.is_dir():
        ggufs = [] if any(path.glob("*.safetensors*")) else sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            names = ", ".join(file.name for file in ggufs)
            raise bad(path, f"holds {len(ggufs)} GGUF files ({names})", "give the one to compress")
        return open_gguf(path, ggufs[0]) if ggufs else open_directory(path)
    if path.suffix == ".gguf":
        return open_gguf(path, path)
    if any(path.match(pattern) for pattern in PICKLES):
        raise bad(path, "is a pickle, which can run code when loaded", "convert it to safetensors")
    raise bad(path, "is neither a directory nor a .gguf file", "give the model's directory")


def materialize(module: nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> None:
    """Fill every parameter of a module, usually on the meta device, one tensor at a time.

    Parameters that share one tensor still share it afterwards. Persistent buffers are filled in their own dtype;
    non-persistent buffers are not changed.

    Args:
        module: for example one decoder layer; changed in place; its new parameters are on the CPU.
        checkpoint: the source of the tensors.
        prefix: prepended to the module's names to give those in the checkpoint, such as "model.layers.0.".
        dtype: of the parameters.

    Raises:
        CheckpointError: if a tensor is missing, has another shape, or is not finite before or after the cast.
    """
    done: dict[int, Tensor] = {}
    for name, old in module.state_dict(keep_vars=True).items():
        full = prefix + name
        if id(old) not in done:
            done[id(old)] = _filled(old, checkpoint, full, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, done[id(old)])


def _filled(old: Tensor, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    shape = checkpoint.shape(name)
    if shape != tuple(old.shape):
        problem = f"tensor {name!r} has shape {shape}, but the model needs {tuple(old.shape)}"
        raise bad(checkpoint.path, problem, "config and weights must come from the same model")
    is_parameter = isinstance(old, nn.Parameter)
    tensor = checkpoint.tensor(name).to(dtype if is_parameter else old.dtype)
    check_finite(tensor, f"tensor {name!r} in {tensor.dtype}", checkpoint.path)
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
