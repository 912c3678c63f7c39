"""The compressed directory: written beside and renamed when whole; the weight files are as large as the plan says."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

from trimbit.artifact.files import PLAN_FILE, config_fields, require_absent
from trimbit.errors import ArtifactError
from trimbit.model.layout import Layout
from trimbit.model.shards import METADATA, TensorSpec, shard_nbytes, shards
from trimbit.schema.plan import Plan, load_plan

DTYPES = {
    "torch.uint8": "U8",
    "torch.int16": "I16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
}


class Writer:
    """Writes a compressed directory tensor by tensor, in the order of the plan.

    Use as a context: on leaving without an error the directory appears under its name; on an error nothing is left.
    """

    def __init__(self, out: Path, layout: Layout, plan: Plan) -> None:
        require_absent(out)
        self.out = out
        self.plan = plan
        self.layout = layout
        self.files = shards(layout.tensors(plan))
        self.specs = {name: spec for file in self.files for name, spec in file.items()}
        self.pending: dict[str, Tensor] = {}
        self.written = 0
        self.partial = out.parent / f".{out.name}.partial-{os.getpid()}"

    def __enter__(self) -> "Writer":
        try:
            self.partial.mkdir(parents=True)
        except OSError as err:
            raise ArtifactError(f"cannot write {self.out}: {err.strerror}") from err
        return self

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors; a file is written as soon as all of its tensors are there."""
        for name, tensor in tensors.items():
            have = TensorSpec(DTYPES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape))
            if self.specs.get(name) != have:
                raise ArtifactError(f"tensor {name} is {have}, but the plan says {self.specs.get(name)}")
            self.pending[name] = tensor.contiguous()
        while self.written < len(self.files) and self.files[self.written].keys() <= self.pending.keys():
            part = {name: self.pending.pop(name) for name in self.files[self.written]}
            self._save(part, self._file_name(self.written))
            self.written += 1

    def take(self, folder: Path, changed: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Take the weight files and the plan of a directory that the same plan was applied to before.

        Tensors in `changed` take the place of those in the files.
        """
        for at, specs in enumerate(self.files):
            source = folder / self._file_name(at)
            if not source.is_file() or source.stat().st_size != shard_nbytes(specs):
                raise ArtifactError(f"{folder}, where the plan was tried, is damaged; remove it and run again")
            if specs.keys() & changed.keys():
                tensors = load_file(source)
                self.add(tensors | {name: changed[name] for name in specs.keys() & changed.keys()})
                continue
            try:
                shutil.copyfile(source, self.partial / source.name)
            except OSError as err:
                raise ArtifactError(f"cannot write {self.out}: {err.strerror}") from err
            self.written += 1
        found = load_plan(folder / PLAN_FILE).found_by
        self.plan = self.plan.with_provenance(measured_damage=found.measured_damage)

    def _file_name(self, index: int) -> str:
        count = len(self.files)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _save(self, tensors: dict[str, Tensor], name: str) -> None:
        try:
            save_file(tensors, self.partial / name, metadata=METADATA)
        except Exception as err:
            raise ArtifactError(f"cannot write {self.out / name}: {err}") from err

    def write(self, name: str, content: str | bytes) -> None:
        """Write one of the files beside the weights."""
        data = content.encode() if isinstance(content, str) else content
        try:
            (self.partial / name).write_bytes(data)
        except OSError as err:
            raise ArtifactError(f"cannot write {self.out / name}: {err.strerror}") from err

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        try:
            self._finish()
            self.partial.rename(self.out)
        except OSError as err:
            raise ArtifactError(f"cannot write {self.out}: {err.strerror}") from err
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _finish(self) -> None:
        missing = [name for file in self.files[self.written :] for name in file]
        if missing:
            raise ArtifactError(f"{len(missing)} tensors of the plan were never written, the first is {missing[0]}")
        if len(self.files) > 1:
            index = {name: self._file_name(at) for at, file in enumerate(self.files) for name in file}
            size = sum(spec.nbytes for spec in self.specs.values())
            self.write(
                "model.safetensors.index.json",
                json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1),
            )
        self.write("config.json", json.dumps(config_fields(self.layout, self.plan), indent=1) + "\n")
        self.plan.save(self.partial / PLAN_FILE)
