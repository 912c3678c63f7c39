"""Layouts of tiny models, and files of the tensors that a plan says."""

import torch
from safetensors.torch import save_file

from tiny import tiny_config
from trimbit.artifact.writer import DTYPES as ARTIFACT_DTYPES
from trimbit.model.build import build_layout
from trimbit.model.shards import METADATA

DTYPES = {name: getattr(torch, kind.removeprefix("torch.")) for kind, name in ARTIFACT_DTYPES.items()}


def layout_of(model_type, *, tied):
    config = tiny_config(model_type)
    config.tie_word_embeddings = tied
    return build_layout(config)


LAYOUTS = {
    "llama": layout_of("llama", tied=False),
    "tied": layout_of("llama", tied=True),
    "qwen2": layout_of("qwen2", tied=True),
}


LLAMA = LAYOUTS["llama"]


def write(specs, path):
    """Zeros of these types and shapes as a safetensors file; gives its bytes."""
    save_file(
        {name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for name, spec in specs.items()},
        path,
        metadata=METADATA,
    )
    return path.stat().st_size
