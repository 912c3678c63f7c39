"""Reads an original causal language model tensor by tensor, never the whole of it.

Sources are a directory with `model.safetensors`, one with shards and an index, or a `.gguf` file.
Every tensor is copied out of its file, so that no mapping stays resident between two reads.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as hf_gguf
from transformers.configuration_utils import PreTrainedConfig

from trimbit.errors import CheckpointError, LayoutError

KNOWN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
_FLOATS = ("BF16", "F16", "F32")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SIDECARS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|bpe)|merges\.txt"
    r"|.*\.tiktoken|spiece\.model|sentencepiece.*\.model|chat_template.*|generation_config\.json"
    r"|additional_chat_templates/.*|(LICEN[CS]E|NOTICE|COPYING).*"
)
_NAMES_AND_VERSIONS = {"transformers_version", "_name_or_path", "_model_name_or_path"}
_NOT_ARCHITECTURE = _NAMES_AND_VERSIONS | {"torch_dtype", "dtype"}
_RECOMPUTED = ".rotary_emb.inv_freq"  # a buffer that old checkpoints hold and the config implies


def _bad(where: Path, problem: str, advice: str) -> CheckpointError:
    return CheckpointError(f"{where}: {problem}; {advice}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _unknown_family(where: Path, model_type: str) -> LayoutError:
    nearest = difflib.get_close_matches(model_type.lower(), KNOWN_FAMILIES, n=1, cutoff=0.0)[0]
    msg = (
        f"{where}: model type {model_type!r} is not known to transformers; the nearest that trimbit"
        f" knows is {nearest!r}; correct it, or choose one of {', '.join(KNOWN_FAMILIES)}"
    )
    return LayoutError(msg)


class _Entry(NamedTuple):
    """Where one tensor lies: its weight file, its shape, and how to copy it out."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An original model on disk, opened and checked, with its tensors left where they are.

    Made by `open_checkpoint`.

    Attributes:
        path: what the user gave, a directory or a `.gguf` file.
        config: the transformers config of the original model.
        model_id: hub id recorded in config.json, else the directory's name; a GGUF's general.name.
        license: id from the GGUF metadata or the model card's front matter; None if neither has it.
    """

    path: Path
    config: PreTrainedConfig
    model_id: str
    license: str | None
    _entries: Mapping[str, _Entry]
    _gguf: Path | None = None

    @property
    def names(self) -> frozenset[str]:
        """Transformers' parameter names; a tied `lm_head.weight` is not among them."""
        return frozenset(self._entries)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.0)
            raise _bad(self.path, f"has no tensor {name!r}", f"the nearest name is {near[0]!r}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as transformers has it, without reading it.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        return self._entry(name).shape

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor onto the CPU into memory of its own.

        Returns:
            bf16, fp16 or fp32 as stored; fp32 from a GGUF, whose blocks are dequantised.

        Raises:
            CheckpointError: if there is no such tensor, it cannot be read, or it has a NaN or Inf.
        """
        entry = self._entry(name)
        try:
            tensor = entry.read()
        except (SafetensorError, OSError, EOFError, ValueError, LookupError) as error:
            raise _damaged(entry.file, error, f"cannot read tensor {name!r}") from error
        _check_finite(tensor, f"tensor {name!r}", entry.file)
        return tensor

    def tokenizer(self) -> Any:  # noqa: ANN401 - AutoTokenizer has no common typed base
        """The model's fast tokenizer.

        Raises:
            CheckpointError: if there is none, it cannot be read, or it only exists as remote code.
        """
        where = self._gguf or self.path
        source: dict[str, str] = {"gguf_file": where.name} if self._gguf else {}
        folder = where.parent if self._gguf else where
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), use_fast=True, local_files_only=True, trust_remote_code=False, **source
            )
        except Exception as error:
            advice = "add the original's tokenizer files"
            raise _bad(where, f"no usable tokenizer ({_first_line(error)})", advice) from error
        if not tokenizer.is_fast:
            raise _bad(where, "the tokenizer has no fast version", "add a tokenizer.json")
        return tokenizer

    def sidecars(self) -> list[Path]:
        """Files to carry over: tokenizer, chat template, generation config, licence.

        Returns:
            Sorted paths below `path` (chat templates may lie in a subfolder); none for a GGUF.
        """
        if self._gguf:
            return []
        files = [*self.path.glob("*"), *self.path.glob("additional_chat_templates/*")]
        names = {file: file.relative_to(self.path).as_posix() for file in files if file.is_file()}
        return sorted(file for file, name in names.items() if _SIDECARS.fullmatch(name))

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the SHA-256 of each weight file, in name order; computed once."""
        return self._weights_hash

    @cached_property
    def _weights_hash(self) -> str:
        total = hashlib.sha256()
        for path in sorted({entry.file for entry in self._entries.values()}):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def config_hash(self) -> str:
        """SHA-256 (hex) of the config as canonical JSON, without version, name and dtype."""
        fields = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_ARCHITECTURE}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens an uncompressed causal language model; reads headers only and never the network.

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
        raise _bad(path, "does not exist", "hub ids are not downloaded, give a local directory")
    if path.is_dir():
        ggufs = [] if any(path.glob("*.safetensors*")) else sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            names = ", ".join(file.name for file in ggufs)
            raise _bad(path, f"holds {len(ggufs)} GGUF files ({names})", "give the one to compress")
        return _open_gguf(path, ggufs[0]) if ggufs else _open_directory(path)
    if path.suffix == ".gguf":
        return _open_gguf(path, path)
    if any(path.match(pattern) for pattern in _PICKLES):
        raise _bad(path, "is a pickle, which can run code when loaded", "convert it to safetensors")
    raise _bad(path, "is neither a directory nor a .gguf file", "give the model's directory")


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
        raise _bad(checkpoint.path, problem, "config.json and weights must belong together")
    is_parameter = isinstance(old, nn.Parameter)
    tensor = checkpoint.tensor(name).to(dtype if is_parameter else old.dtype)
    _check_finite(tensor, f"tensor {name!r} in {tensor.dtype}", checkpoint.path)
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor


def _check_finite(tensor: Tensor, what: str, where: Path) -> None:
    if tensor.numel() == 0 or all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        return  # aminmax carries NaN through and needs no temporary
    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    problem = f"{what} has {nans} NaN and {infs} Inf values of {tensor.numel()}"
    raise _bad(where, problem, "get an intact copy of the model, or use a wider dtype")


def _damaged(where: Path, error: Exception, problem: str) -> CheckpointError:
    problem = f"{problem} ({_first_line(error)})"
    return _bad(where, problem, "the file is truncated or corrupt, fetch it again")


# ---- a directory with safetensors


def _open_directory(path: Path) -> Checkpoint:
    raw = _read_config(path)
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        problem = f"transformers refuses it ({_first_line(error)})"
        raise _bad(path / "config.json", problem, "correct the config") from error
    files = _weight_files(path)
    entries: dict[str, _Entry] = {}
    for file, listed in files.items():
        held = _safetensors_entries(file)
        if listed is not None and (odd := sorted(set(held) ^ listed)):
            state = "is in the index but not here" if odd[0] in listed else "is not in the index"
            raise _bad(file, f"tensor {odd[0]!r} {state}", "fetch shards and index again")
        entries |= held
    entries = {k: v for k, v in entries.items() if not k.endswith(_RECOMPUTED)}
    if config.tie_word_embeddings:
        entries.pop("lm_head.weight", None)
    recorded = str(raw.get("_name_or_path") or "")
    model_id = recorded if re.fullmatch(r"[\w.-]+/[\w.-]+", recorded) else path.resolve().name
    return Checkpoint(path, config, model_id, _card_license(path / "README.md"), entries)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _bad(file, f"is not JSON ({_first_line(error)})", "fetch it again") from error
    if not isinstance(data, dict):
        raise _bad(file, f"holds a {type(data).__name__}, not an object", "fetch it again")
    return data


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise _bad(path, "has no config.json", "give the directory of a Hugging Face model")
    raw = _read_json(file)
    model_type = raw.get("model_type")
    if model_type == "trimbit":
        raise _bad(path, "already compressed by trimbit", "compress the original instead")
    if raw.get("quantization_config") is not None:
        settings = raw["quantization_config"]
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        raise _bad(path, f"already quantised (method {method})", "compress the original instead")
    if not isinstance(model_type, str):
        raise _bad(file, "names no model_type", "give the config of a Hugging Face causal LM")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            problem = f"model type {model_type!r} needs remote code, which is never run"
            raise _bad(file, problem, "choose a model whose code is part of transformers")
        raise _unknown_family(file, model_type)
    return raw


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors the index lists for it (None without index)."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        if pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
            problem = f"holds only pickled weights ({pickles[0]}), which can run code when loaded"
            raise _bad(path, problem, "convert them to safetensors")
        problem = "has no model.safetensors, model.safetensors.index.json or .gguf file"
        raise _bad(path, problem, "give a directory with weights")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(index, "has no weight_map", "fetch it again")
    files: dict[Path, set[str] | None] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        file = path / shard
        if Path(shard).name != shard or not file.is_file():
            raise _bad(index, f"shard {shard!r} is not in the directory", "fetch the missing shard")
        files[file] = {name for name, its in weight_map.items() if its == shard}
    return files


def _safetensors_entries(file: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                if (dtype := part.get_dtype()) not in _FLOATS:
                    problem = f"tensor {name!r} has dtype {dtype}, not {', '.join(_FLOATS)}"
                    raise _bad(file, problem, "give the original, unquantised model")
                shape = tuple(part.get_shape())
                entries[name] = _Entry(file, shape, partial(_read_safetensor, file, name))
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error, "not a readable safetensors file") from error
    return entries


def _read_safetensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor.clone()  # depending on the version, a view of a mapping of the file


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
        problem = f"front matter is not YAML ({_first_line(error)})"
        raise _bad(card, problem, "correct it") from error
    value = fields.get("license") if isinstance(fields, dict) else None
    return ", ".join(map(str, value)) if isinstance(value, list) else value and str(value)


# ---- a GGUF file


class _Blocks(NamedTuple):
    """One tensor's blocks in a GGUF file; `shape` has numpy's order, rows first."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    fields, blocks = _read_gguf_header(file)
    arch = str(fields.get("general.architecture"))
    if arch not in hf_gguf.GGUF_SUPPORTED_ARCHITECTURES:
        raise _unknown_family(file, arch)
    try:
        config = AutoConfig.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        processor_class = hf_gguf.TENSOR_PROCESSORS.get(arch, hf_gguf.TensorProcessor)
        processor = processor_class(config=config.to_dict())  # type: ignore[no-untyped-call]
        needed = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        to_hf = _gguf_names(arch, config.num_hidden_layers, needed)
    except Exception as error:
        problem = f"transformers cannot read this {arch!r} GGUF ({_first_line(error)})"
        raise _bad(file, problem, "give the original safetensors") from error
    if config.tie_word_embeddings:
        needed.pop("lm_head.weight", None)
    entries = _gguf_entries(file, blocks, to_hf, processor)
    _check_complete(file, entries, needed)
    model_id = str(fields.get("general.name") or file.stem)
    license_id = fields.get("general.license")
    return Checkpoint(path, config, model_id, license_id and str(license_id), entries, file)


def _read_gguf_header(file: Path) -> tuple[dict[str, Any], list[_Blocks]]:
    """The `general.*` and `split.*` metadata and where each tensor lies; the mapping is let go."""
    try:
        from gguf import GGUFReader  # an extra
    except ImportError as error:
        advice = "pip install 'trimbit[gguf]'"
        raise _bad(file, "reading it needs the package gguf", advice) from error
    try:
        reader = GGUFReader(file)
        fields = {
            key: field.contents() for key, field in reader.fields.items() if key.startswith(("general.", "split."))
        }
        blocks = [
            _Blocks(t.name, t.tensor_type, tuple(t.shape[::-1].tolist()), t.data_offset, int(t.n_bytes))
            for t in reader.tensors
        ]
    except Exception as error:
        raise _damaged(file, error, "not a readable GGUF file") from error
    if reader.byte_order == "S":
        raise _bad(file, "has the other byte order", "convert it to this machine's byte order")
    if int(fields.get("split.count", 1)) > 1:
        problem = f"is one of {fields['split.count']} parts"
        raise _bad(file, problem, "merge them with llama-gguf-split")
    return fields, blocks


def _gguf_names(arch: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """GGUF's name -> transformers' name; one that GGUF has no name for is left out.

    `get_gguf_hf_weights_map` agrees, but builds gguf's table anew for each module: ten seconds.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # an extra

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(kind, layers)
    parts = {name: name.rpartition(".") for name in names}
    known = {name: (table.get_name(stem), leaf) for name, (stem, _, leaf) in parts.items()}
    return {f"{stem}.{leaf}": name for name, (stem, leaf) in known.items() if stem is not None}


def _gguf_entries(
    file: Path,
    blocks: list[_Blocks],
    to_hf: Mapping[str, str],
    processor: hf_gguf.TensorProcessor,
) -> dict[str, _Entry]:
    from gguf import GGML_QUANT_SIZES, dequantize  # an extra

    entries: dict[str, _Entry] = {}
    for block in blocks:
        name = to_hf.get(block.name)
        if name is None or name in entries:
            state = f"is a second {name!r}" if name else "has no counterpart"
            problem = f"tensor {block.name!r} {state} in transformers' model, which would ignore it"
            raise _bad(file, problem, "give the original safetensors")
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[block.kind][1], np.uint8), block.kind)
        except NotImplementedError as error:
            problem = f"tensor {block.name!r} has type {block.kind.name}, which is not a weight's"
            raise _bad(file, problem, "give the model in another type") from error
        entries[name] = _Entry(file, block.shape, partial(_read_blocks, file, block, processor))
    return entries


def _read_blocks(file: Path, block: _Blocks, processor: hf_gguf.TensorProcessor) -> Tensor:
    from gguf import dequantize  # an extra

    with file.open("rb") as opened:
        opened.seek(block.offset)
        raw = np.fromfile(opened, np.uint8, block.nbytes)
    if raw.nbytes != block.nbytes:
        msg = f"{raw.nbytes} of {block.nbytes} bytes"
        raise EOFError(msg)
    values = dequantize(raw.reshape(*block.shape[:-1], -1), block.kind)
    values = processor.process(values, block.name).weights
    return torch.from_numpy(np.ascontiguousarray(values))


def _check_complete(file: Path, entries: Mapping[str, _Entry], needed: Mapping[str, tuple[int, ...]]) -> None:
    if odd := sorted(needed.keys() ^ entries.keys()):
        state = "is missing" if odd[0] in needed else "is not a parameter of the model"
        raise _bad(file, f"tensor {odd[0]!r} {state} ({len(odd)} such)", "fetch it again")
    for name, shape in needed.items():
        if entries[name].shape != shape:
            problem = f"tensor {name!r} has shape {entries[name].shape}, its metadata imply {shape}"
            raise _bad(file, problem, "fetch it again, or give the original safetensors")
