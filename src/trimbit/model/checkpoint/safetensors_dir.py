"""Open a directory with `model.safetensors`, or with shards and an index."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig

from trimbit.model.checkpoint.checkpoint import PICKLES, Checkpoint, Entry, bad, damaged, first_line
from trimbit.model.checkpoint.complete import require_complete
from trimbit.model.checkpoint.tied_head import settle_tied_head
from trimbit.model.families import unknown_family
from trimbit.model.parameters import parameter_shapes

_FLOATS = ("BF16", "F16", "F32")
_RECOMPUTED = ".rotary_emb.inv_freq"  # a buffer in old checkpoints, which is computed from the config


def open_directory(path: Path) -> Checkpoint:
    """Open a directory with config.json and safetensors; see `open_checkpoint` for the errors."""
    raw = _read_config(path)
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        problem = f"transformers cannot read it ({first_line(error)})"
        raise bad(path / "config.json", problem, "correct the config") from error
    files = _weight_files(path)
    entries: dict[str, Entry] = {}
    for file, listed in files.items():
        held = _safetensors_entries(file)
        if listed is not None and (odd := sorted(set(held) ^ listed)):
            state = "is in the index but not here" if odd[0] in listed else "is not in the index"
            raise bad(file, f"tensor {odd[0]!r} {state}", "download the shards and the index again")
        entries |= held
    entries = {k: v for k, v in entries.items() if not k.endswith(_RECOMPUTED)}
    entries = settle_tied_head(config, entries)
    require_complete(path, entries, parameter_shapes(config))
    return Checkpoint(
        path, config, _model_id(path, str(raw.get("_name_or_path") or "")), _card_license(path / "README.md"), entries
    )


def _model_id(path: Path, recorded: str) -> str:
    """The hub id from the config, or from the folder names of the hub's cache; else the folder's name."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", recorded):
        return recorded
    whole = path.resolve()
    if whole.parent.name == "snapshots" and whole.parts[-3].startswith("models--"):
        return whole.parts[-3].removeprefix("models--").replace("--", "/")
    return whole.name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad(file, f"is not JSON ({first_line(error)})", "download it again") from error
    if not isinstance(data, dict):
        raise bad(file, f"holds a {type(data).__name__}, not a JSON object", "download it again")
    return data


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise bad(path, "has no config.json", "give the directory of a Hugging Face model")
    raw = _read_json(file)
    model_type = raw.get("model_type")
    if model_type == "trimbit":
        raise bad(path, "is already compressed by trimbit", "compress the original instead")
    if raw.get("quantization_config") is not None:
        settings = raw["quantization_config"]
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        raise bad(path, f"is already quantised (method {method})", "compress the original instead")
    if not isinstance(model_type, str):
        raise bad(file, "has no model_type", "give the config of a Hugging Face causal LM")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            problem = f"model type {model_type!r} needs remote code, which is never run"
            raise bad(file, problem, "choose a model whose code is part of transformers")
        raise unknown_family(model_type, file)
    return raw


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that the index lists for it (None: there is no index)."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        if pickles := sorted(file.name for pattern in PICKLES for file in path.glob(pattern)):
            problem = f"holds only pickled weights ({pickles[0]}), which can run code when loaded"
            raise bad(path, problem, "convert them to safetensors")
        problem = "has no model.safetensors, model.safetensors.index.json or .gguf file"
        raise bad(path, problem, "give a directory with weights")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad(index, "has no weight_map", "download it again")
    files: dict[Path, set[str] | None] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        file = path / shard
        if Path(shard).name != shard or not file.is_file():
            raise bad(index, f"shard {shard!r} is not in the directory", "download the missing shard")
        files[file] = {name for name, its in weight_map.items() if its == shard}
    return files


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                if (dtype := part.get_dtype()) not in _FLOATS:
                    problem = f"tensor {name!r} has dtype {dtype}, not {', '.join(_FLOATS)}"
                    raise bad(file, problem, "give the original, unquantised model")
                shape = tuple(part.get_shape())
                entries[name] = Entry(file, shape, partial(_read_safetensor, file, name))
    except (SafetensorError, OSError) as error:
        raise damaged(file, error, "not a readable safetensors file") from error
    return entries


def _read_safetensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor.clone()  # in some versions it is a view of a memory map


def _card_license(card: Path) -> str | None:
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        return None
    try:
        fields = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        problem = f"its front matter is not YAML ({first_line(error)})"
        raise bad(card, problem, "correct it") from error
    value = fields.get("license") if isinstance(fields, dict) else None
    return ", ".join(map(str, value)) if isinstance(value, list) else value and str(value)
