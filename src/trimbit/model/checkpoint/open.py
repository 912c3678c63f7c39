"""Opens an original causal language model, and fills modules with its weights tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor, nn

from trimbit.model.checkpoint.checkpoint import PICKLES, Checkpoint, bad, check_finite
from trimbit.model.checkpoint.gguf import open_gguf
from trimbit.model.checkpoint.safetensors_dir import open_directory


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens an uncompressed causal language model; never reads the network.

    Only headers are read, and where the config ties a head that is stored nevertheless, head and embedding.

    Args:
        path: a directory with config.json and safetensors, a `.gguf` file, or a directory whose
            only weights are one `.gguf` file.

    Raises:
        CheckpointError: if it is missing, damaged, pickled, already quantised or compressed, or
            needs remote code.
        LayoutError: if transformers does not know its model type.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise bad(path, "does not exist", "hub ids are not downloaded, give a local directory")
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
    """Fills every parameter of a module, usually on the meta device, one tensor at a time.

    Parameters that share one tensor stay shared. Persistent buffers are filled in their own dtype;
    non-persistent buffers are left alone.

    Args:
        module: for example one decoder layer; changed in place, its parameters land on the CPU.
        checkpoint: where the tensors come from.
        prefix: what precedes the module's own names in the checkpoint, such as "model.layers.0.".
        dtype: of the parameters.

    Raises:
        CheckpointError: if a tensor is missing, has another shape, or is not finite (even
            if only after the cast).
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
        problem = f"tensor {name!r} has shape {shape} but the model needs {tuple(old.shape)}"
        raise bad(checkpoint.path, problem, "config.json and weights must belong together")
    is_parameter = isinstance(old, nn.Parameter)
    tensor = checkpoint.tensor(name).to(dtype if is_parameter else old.dtype)
    check_finite(tensor, f"tensor {name!r} in {tensor.dtype}", checkpoint.path)
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
