"""Open a `.gguf` file; each tensor is dequantised to fp32 when it is read."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers import modeling_gguf_pytorch_utils as hf_gguf

from trimbit.model.checkpoint.checkpoint import Checkpoint, Entry, bad, damaged, first_line
from trimbit.model.checkpoint.complete import require_complete
from trimbit.model.families import unknown_family
from trimbit.model.parameters import parameter_shapes


class _Blocks(NamedTuple):
    """The stored blocks of one tensor in a GGUF file; `shape` is in numpy's order, rows first."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def open_gguf(path: Path, file: Path) -> Checkpoint:
    """Open the GGUF `file`, which is `path` or in the directory `path`; see `open_checkpoint` for the errors."""
    fields, blocks = _read_gguf_header(file)
    arch = str(fields.get("general.architecture"))
    if arch not in hf_gguf.GGUF_SUPPORTED_ARCHITECTURES:
        raise unknown_family(arch, file)
    try:
        config = AutoConfig.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        processor_class = hf_gguf.TENSOR_PROCESSORS.get(arch, hf_gguf.TensorProcessor)
        processor = processor_class(config=config.to_dict())  # type: ignore[no-untyped-call]
        needed = parameter_shapes(config)
        to_hf = _gguf_names(arch, config.num_hidden_layers, needed)
    except Exception as error:
        problem = f"transformers cannot read this {arch!r} GGUF ({first_line(error)})"
        raise bad(file, problem, "give the original safetensors") from error
    entries = _gguf_entries(file, blocks, to_hf, processor)
    require_complete(file, entries, needed)
    model_id = str(fields.get("general.name") or file.stem)
    license_id = fields.get("general.license")
    return Checkpoint(path, config, model_id, license_id and str(license_id), entries, file)


def _read_gguf_header(file: Path) -> tuple[dict[str, Any], list[_Blocks]]:
    """The `general.*` and `split.*` metadata, and the blocks of each tensor; the memory map is not kept."""
    try:
        from gguf import GGUFReader  # an extra
    except ImportError as error:
        advice = "pip install 'trimbit[gguf]'"
        raise bad(file, "reading GGUF files needs the package gguf", advice) from error
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
        raise damaged(file, error, "not a readable GGUF file") from error
    if reader.byte_order == "S":
        raise bad(file, "has a different byte order than this machine", "convert it")
    if int(fields.get("split.count", 1)) > 1:
        problem = f"is one of {fields['split.count']} parts"
        raise bad(file, problem, "merge them with llama-gguf-split")
    return fields, blocks


def _gguf_names(arch: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """Names in GGUF -> names in transformers; parameters without a GGUF name are left out.

    `get_gguf_hf_weights_map` gives the same, but rebuilds gguf's table for each module, which takes ten seconds.
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
) -> dict[str, Entry]:
    from gguf import GGML_QUANT_SIZES, dequantize  # an extra

    entries: dict[str, Entry] = {}
    for block in blocks:
        name = to_hf.get(block.name)
        if name is None or name in entries:
            state = f"is a duplicate of {name!r}" if name else "has no counterpart"
            problem = f"tensor {block.name!r} {state} in transformers' model, and would be ignored"
            raise bad(file, problem, "give the original safetensors")
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[block.kind][1], np.uint8), block.kind)
        except NotImplementedError as error:
            problem = f"tensor {block.name!r} has type {block.kind.name}, which cannot be dequantised"
            raise bad(file, problem, "give the model in another quantisation, or the original safetensors") from error
        entries[name] = Entry(file, block.shape, partial(_read_blocks, file, block, processor))
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
