"""An original model on disk: its tensors, tokenizer and hashes are read on demand.

Every tensor is copied out of its file, so that no memory map stays resident between reads.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from trimbit.errors import CheckpointError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SIDECARS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|bpe)|merges\.txt"
    r"|.*\.tiktoken|spiece\.model|sentencepiece.*\.model|chat_template.*|generation_config\.json"
    r"|additional_chat_templates/.*|(LICEN[CS]E|NOTICE|COPYING).*"
)
_NAMES_AND_VERSIONS = {"transformers_version", "_name_or_path", "_model_name_or_path"}
_NOT_ARCHITECTURE = _NAMES_AND_VERSIONS | {"torch_dtype", "dtype"}


def bad(where: Path, problem: str, advice: str) -> CheckpointError:
    """The error for a bad file, in one line: where, what is wrong, what to do."""
    return CheckpointError(f"{where}: {problem}; {advice}")


def first_line(error: BaseException) -> str:
    """The type and the first line of another library's error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class Entry(NamedTuple):
    """One stored tensor: its weight file, its shape, and the function that reads it."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An original model on disk, opened and checked; its tensors are not loaded. Made by `open_checkpoint`.

    Attributes:
        path: what the user gave, a directory or a `.gguf` file.
        config: the transformers config of the original model; if a stored head differs from the embedding, it says
            untied, even if the file says tied.
        model_id: hub id from config.json or the hub's cache, else the directory's name; a GGUF's general.name or file
            name.
        license: its id, from the GGUF metadata or the front matter of the model card; None if not given there.
    """

    path: Path
    config: PreTrainedConfig
    model_id: str
    license: str | None
    _entries: Mapping[str, Entry]
    _gguf: Path | None = None

    @property
    def names(self) -> frozenset[str]:
        """Parameter names as in transformers, without a tied head."""
        return frozenset(self._entries)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.0)
            raise bad(self.path, f"has no tensor {name!r}", f"the nearest name is {near[0]!r}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as in transformers, without reading the tensor.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        return self._entry(name).shape

    def tensor(self, name: str) -> Tensor:
        """Read one tensor onto the CPU, into its own memory.

        Returns:
            bf16, fp16 or fp32 as stored; fp32 from a GGUF, whose blocks are dequantised.

        Raises:
            CheckpointError: if there is no such tensor, it cannot be read, or it has a NaN or Inf.
        """
        entry = self._entry(name)
        try:
            tensor = entry.read()
        except (SafetensorError, OSError, EOFError, ValueError, LookupError) as error:
            raise damaged(entry.file, error, f"cannot read tensor {name!r}") from error
        check_finite(tensor, f"tensor {name!r}", entry.file)
        return tensor

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> "Checkpoint":
        """A checkpoint that applies `change(name, tensor)` to each tensor as it is read; shapes must not change."""

        def entry(name: str, own: Entry) -> Entry:
            return own._replace(read=lambda: change(name, own.read()))

        return replace(self, _entries={name: entry(name, own) for name, own in self._entries.items()})

    def tokenizer(self) -> Any:  # noqa: ANN401 - AutoTokenizer has no common typed base
        """The model's fast tokenizer; cached, since reading that of a GGUF takes seconds.

        Raises:
            CheckpointError: if there is none, it cannot be read, it needs remote code, or it is not fast.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401
        where = self._gguf or self.path
        source: dict[str, str] = {"gguf_file": where.name} if self._gguf else {}
        folder = where.parent if self._gguf else where
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), use_fast=True, local_files_only=True, trust_remote_code=False, **source
            )
        except Exception as error:
            advice = "add the original's tokenizer files"
            raise bad(where, f"has no usable tokenizer ({first_line(error)})", advice) from error
        if not tokenizer.is_fast:
            raise bad(where, "has no fast tokenizer", "add a tokenizer.json")
        return tokenizer

    def sidecars(self) -> list[Path]:
        """Files to copy next to the weights: tokenizer, chat templates, generation config, licence.

        Returns:
            Sorted paths below `path` (chat templates may be in a subfolder); empty for a GGUF.
        """
        if self._gguf:
            return []
        files = [*self.path.glob("*"), *self.path.glob("additional_chat_templates/*")]
        names = {file: file.relative_to(self.path).as_posix() for file in files if file.is_file()}
        return sorted(file for file, name in names.items() if _SIDECARS.fullmatch(name))

    def weights_hash(self) -> str:
        """SHA-256 (hex) of the SHA-256 digests of the weight files, in name order; computed once."""
        return self._weights_hash

    @cached_property
    def _weights_hash(self) -> str:
        total = hashlib.sha256()
        for path in sorted({entry.file for entry in self._entries.values()}):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def config_hash(self) -> str:
        """SHA-256 (hex) of the config as canonical JSON, without its version, name and dtype fields."""
        fields = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_ARCHITECTURE}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def check_finite(tensor: Tensor, what: str, where: Path) -> None:
    """Refuse a tensor with NaN or Inf.

    Raises:
        CheckpointError: if there is any, naming the tensor.
    """
    if tensor.numel() == 0 or all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        return  # aminmax propagates NaN and needs no temporary
    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    problem = f"{what} has {nans} NaN and {infs} Inf values of {tensor.numel()}"
    raise bad(where, problem, "get an intact copy of the model, or use a wider dtype")


def damaged(where: Path, error: Exception, problem: str) -> CheckpointError:
    """The error for a file that another library cannot read."""
    problem = f"{problem} ({first_line(error)})"
    return bad(where, problem, "the file is truncated or corrupt: download it again")
