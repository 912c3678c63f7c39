"""The files of a compressed directory: their names, and what is in config.json."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimbit.errors import ArtifactError
from trimbit.schema.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # loads torch, which `trimbit show` does not need

MODEL_TYPE = "trimbit"  # the `model_type` of a compressed directory
FORMAT_VERSION = 1
PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.yaml"


def require_absent(out: Path, *, file: bool = False) -> None:
    """Refuse an output that exists or cannot be made, before any long work; an empty directory may exist.

    Raises:
        ArtifactError: if something else exists under this name, or the directory above it is not writable.
    """
    if out.exists() and (file or not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} already exists; give a new {'file' if file else 'directory'} or remove it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ArtifactError(f"cannot write {out}: {above} is not a writable directory")


def config_fields(config: "PreTrainedConfig", structure: Structure) -> dict[str, Any]:
    """The fields of config.json of a compressed directory, given the original's config."""
    base = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        base.pop(key, None)
    fields = {
        "architectures": ["TrimbitForCausalLM"],
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "dtype": "bfloat16",
        "base": base,
        "structure": structure.model_dump(mode="json"),
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "max_position_embeddings"):
        if key in base:
            fields[key] = base[key]
    return fields


def weight_nbytes(path: Path) -> int:
    """Total bytes of the weight files in a directory, headers included, or of one file."""
    files = path.glob("*.safetensors") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def held_nbytes(path: Path) -> int:
    """About what a model takes while it runs: its weights, and as much to unpack them."""
    return 2 * weight_nbytes(path)


def is_compressed(folder: Path) -> bool:
    """Whether a directory holds a compressed model."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        return False
