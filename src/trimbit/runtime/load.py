"""Load an original checkpoint or a compressed directory, to run it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trimbit.artifact.files import is_compressed
from trimbit.errors import ArtifactError
from trimbit.model.checkpoint.checkpoint import first_line
from trimbit.model.checkpoint.open import materialize, open_checkpoint
from trimbit.model.forward.stream import CPU, build_skeleton


def load_model(path: Path, dtype: torch.dtype, device: torch.device = CPU) -> PreTrainedModel:
    """Load an original checkpoint or a compressed directory, to run it on a device.

    Raises:
        TrimbitError: if it is neither, or is damaged.
    """
    model = _compressed(path, dtype) if is_compressed(path) else _original(path, dtype)
    model.to(device)  # type: ignore[arg-type]
    return model


def _compressed(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except SafetensorError as err:
        raise ArtifactError(f"{path}: a weight file is damaged ({err}); compress the model again") from err
    except (OSError, ValueError, RuntimeError) as err:
        raise ArtifactError(f"{path}: cannot load the compressed model: {str(err).splitlines()[0]}") from err
    model.eval()
    return model


def _original(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    checkpoint = open_checkpoint(path)
    model = build_skeleton(checkpoint.config, dtype)
    if model.config.tie_word_embeddings:
        for name, module in model.named_children():
            if name != "lm_head":
                materialize(module, checkpoint, f"{name}.", dtype)
        model.tie_weights()
    else:
        materialize(model, checkpoint, "", dtype)
    return model


def load_tokenizer(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """The tokenizer of an original checkpoint or a compressed directory.

    Raises:
        TrimbitError: if there is none, or it cannot be read.
    """
    if not is_compressed(path):
        return open_checkpoint(path).tokenizer()
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as err:
        problem = f"has no usable tokenizer ({first_line(err)})"
        raise ArtifactError(f"{path}: {problem}; add the original's tokenizer files") from err
