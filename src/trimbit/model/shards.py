"""The weight files before they are written: the tensors in each, and its size in bytes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

ITEM_NBYTES = {"U8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4}
MAX_SHARD_NBYTES = 5 * 10**9  # code: the default of save_pretrained in transformers before 5
METADATA = {"format": "pt"}
_RANK = {"I32": 0, "BF16": 1, "F16": 2, "I16": 3, "U8": 4}  # the order in which safetensors stores dtypes


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of one stored tensor, as safetensors names them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return ITEM_NBYTES[self.dtype] * prod(self.shape)


def shards(specs: Mapping[str, TensorSpec], max_nbytes: int = MAX_SHARD_NBYTES) -> list[dict[str, TensorSpec]]:
    """Split tensors, in order, into files of at most `max_nbytes` bytes of data; a larger tensor gets its own file."""
    files: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if files[-1] and size + spec.nbytes > max_nbytes:
            files.append({})
            size = 0
        files[-1][name] = spec
        size += spec.nbytes
    return files


def shard_nbytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of one safetensors file: length field, header padded to 8, data."""
    header: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for name, spec in _stored_order(specs):
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text.encode()) // 8) * 8 + offset


def _stored_order(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, TensorSpec]]:
    yield from sorted(specs.items(), key=lambda item: (_RANK[item[1].dtype], item[0]))
