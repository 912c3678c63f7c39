"""Cache files with a digest of their content: a damaged file is reported and removed, so that it is made again."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimbit.jobs.cache import save_atomically

log = logging.getLogger(__name__)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write tensors and their digest; the file appears complete or not at all."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**metadata, "digest": _digest(whole, metadata)}
    save_atomically(path, lambda temporary: save_file(whole, temporary, header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Read tensors and metadata; None if there is no file, or it was damaged and has been removed."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as err:
        _damaged(path, str(err))
        return None
    want = metadata.pop("digest", None)
    if want != _digest(tensors, metadata):
        _damaged(path, "its digest does not match")
        return None
    return tensors, metadata


def save_json(path: Path, value: object) -> None:
    """Write a JSON value and its digest; the file appears complete or not at all."""
    text = json.dumps(value)
    whole = json.dumps({"digest": _text_digest(text), "value": value})
    save_atomically(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))


def load_json(path: Path) -> Any:  # noqa: ANN401
    """Read a JSON value; None if there is no file, or it was damaged and has been removed."""
    if not path.exists():
        return None
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        value = whole["value"]
        if whole["digest"] != _text_digest(json.dumps(value)):
            raise ValueError("its digest does not match")
    except (ValueError, KeyError, TypeError) as err:
        _damaged(path, str(err))
        return None
    return value


def _damaged(path: Path, why: str) -> None:
    log.warning("%s is damaged (%s); removing and recomputing it", path, why)
    path.unlink(missing_ok=True)


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    total = hashlib.blake2b(digest_size=16)
    total.update(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            total.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()
