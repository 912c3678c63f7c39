"""Writes the files of a compressed directory, tensor by tensor, in exactly as many bytes as the plan says."""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from safetensors.torch import load_file, save_file
from torch import Tensor

from trimbit.artifact.files import PLAN_FILE, config_fields, require_absent, weight_nbytes
from trimbit.errors import ArtifactError
from trimbit.model.layout import Layout
from trimbit.model.resolved import resolve
from trimbit.model.shards import METADATA, TensorSpec, shard_nbytes, shards
from trimbit.schema.plan import Plan

DTYPES = {
    "torch.uint8": "U8",
    "torch.int16": "I16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
}


class Writer:
    """Takes the tensors of a plan, in the model's order, and writes each weight file once all its tensors are there."""

    def __init__(self, folder: Path, layout: Layout, plan: Plan) -> None:
        self.folder = folder
        self.layout = layout
        self.plan = plan
        self.resolved = resolve(plan, layout)
        self.files = shards(self.resolved.tensors())
        self.specs = {name: spec for file in self.files for name, spec in file.items()}
        self.pending: dict[str, Tensor] = {}
        self.written = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors, and write the weight files that are now complete.

        Raises:
            ArtifactError: if the plan has no tensor of this name, dtype and shape, or a file cannot be written.
        """
        for name, tensor in tensors.items():
            have = TensorSpec(DTYPES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape))
            if self.specs.get(name) != have:
                raise ArtifactError(f"tensor {name} is {have}, but the plan says {self.specs.get(name)}")
            self.pending[name] = tensor.cpu().contiguous()
        while self.written < len(self.files) and self.files[self.written].keys() <= self.pending.keys():
            part = {name: self.pending.pop(name) for name in self.files[self.written]}
            self._save(part, file_name(self.written, len(self.files)))
            self.written += 1

    def _save(self, tensors: dict[str, Tensor], name: str) -> None:
        try:
            save_file(tensors, self.folder / name, metadata=METADATA)
        except Exception as err:
            raise ArtifactError(f"cannot write {self.folder / name}: {err}") from err

    def finish(self) -> None:
        """Write config.json, plan.json and, if there are several weight files, their index.

        Raises:
            ArtifactError: if a tensor of the plan is missing, or the weight files are not as large as the plan says.
        """
        missing = [name for file in self.files[self.written :] for name in file]
        if missing:
            raise ArtifactError(f"{len(missing)} tensors of the plan were never written, the first is {missing[0]}")
        have, want = weight_nbytes(self.folder), sum(map(shard_nbytes, self.files))
        if have != want:
            raise ArtifactError(f"{self.folder}: the weight files have {have:,} bytes, but the plan says {want:,}")
        if len(self.files) > 1:
            names = {name: file_name(at, len(self.files)) for at, file in enumerate(self.files) for name in file}
            size = sum(spec.nbytes for spec in self.specs.values())
            index = json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1)
            write_file(self.folder, "model.safetensors.index.json", index)
        config = config_fields(self.layout.config, self.resolved.structure)
        write_file(self.folder, "config.json", json.dumps(config, indent=1) + "\n")
        write_file(self.folder, PLAN_FILE, self.plan.to_json())


def copy_weights(source: Path, writer: Writer, changed: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Fill a writer with the weight files of a directory that was made by the same plan.

    Tensors in `changed` replace those in the files.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    count = len(writer.files)
    for at, specs in enumerate(writer.files):
        name = file_name(at, count)
        if own := specs.keys() & changed.keys():
            writer.add(load_file(source / name) | {key: changed[key] for key in own})
            continue
        try:
            shutil.copyfile(source / name, writer.folder / name)
        except OSError as err:
            raise ArtifactError(f"cannot write {writer.folder / name}: {err.strerror}") from err
        writer.written += 1


def file_name(index: int, count: int) -> str:
    """The name of weight file number `index`, from 0, of `count`."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_file(folder: Path, name: str, content: str | bytes) -> None:
    """Write one file of a compressed directory.

    Raises:
        ArtifactError: if it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as err:
        raise ArtifactError(f"cannot write {path}: {err.strerror}") from err


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` if the block ends without an error, and removed otherwise.

    Temporary folders that dead processes of this host left behind are removed, too.

    Raises:
        ArtifactError: if `out` exists or cannot be made.
    """
    require_absent(out)
    _sweep(out)
    partial = out.parent / f".{out.name}.partial-{platform.node()}-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as err:
        raise ArtifactError(f"cannot write {out}: {err.strerror}") from err
    try:
        yield partial
        try:
            partial.rename(out)
        except OSError as err:
            raise ArtifactError(f"cannot write {out}: {err.strerror}") from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(out: Path) -> None:
    for path in out.parent.glob(f".{out.name}.partial-{platform.node()}-*") if out.parent.is_dir() else ():
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
