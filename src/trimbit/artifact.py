"""The compressed directory: written beside and renamed when whole; the weight files are as large as the plan says."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trimbit.errors import ArtifactError
from trimbit.model.layout import Layout
from trimbit.model.shards import METADATA, TensorSpec, shard_nbytes, shards
from trimbit.plan import Plan, load_plan
from trimbit.runtime import Structure

METHOD = "trimbit"  # the `model_type` of a compressed directory
FORMAT_VERSION = 1
DTYPES = {
    "torch.uint8": "U8",
    "torch.int16": "I16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
}
PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.yaml"


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
        self.plan = self.plan.telling(measured_damage=found.measured_damage)

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


def require_absent(out: Path, *, file: bool = False) -> None:
    """Refuse an output that exists or cannot be made, before anything long; a directory may be there if it is empty.

    Raises:
        ArtifactError: if there is something under this name already, or no directory that it can be made in.
    """
    if out.exists() and (file or not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} exists already; give a new {'file' if file else 'directory'} or remove it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ArtifactError(f"cannot write {out}: {above} is no directory that can be written to")


def config_fields(layout: Layout, plan: Plan) -> dict[str, Any]:
    """config.json of a compressed directory."""
    base = layout.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        base.pop(key, None)
    fields = {
        "architectures": ["TrimbitForCausalLM"],
        "model_type": METHOD,
        "format_version": FORMAT_VERSION,
        "dtype": "bfloat16",
        "base": base,
        "structure": Structure.of(plan, layout).model_dump(mode="json"),
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "max_position_embeddings"):
        if key in base:
            fields[key] = base[key]
    return fields


def model_card(
    version: str, model_id: str, license_name: str | None, layout: Layout, plan: Plan, calibration: str
) -> str:
    """README.md of a compressed directory."""
    nbytes, found = layout.file_nbytes(plan), plan.found_by
    license_line = f"license: {license_name}\n" if license_name else ""
    damage = f"{found.measured_damage:.4f} nats a token" if found.measured_damage is not None else "not measured"
    cache = f" Keys and values are cached in {plan.kv_cache.label}." if plan.kv_cache is not None else ""
    text = "text sampled from the model itself" if calibration == "self" else Path(calibration).name
    return (
        f"---\nbase_model: {model_id}\nlibrary_name: trimbit\n{license_line}"
        "tags: [trimbit, quantized, pruned]\n---\n\n"
        f"# {model_id}, {nbytes / 1e6:.1f} MB\n\n"
        f"Compressed with trimbit {version}: {found.method}. Weight file {nbytes:,} bytes, "
        f"{8 * nbytes / layout.parameters:.2f} bits per original parameter; "
        f"KL to the original on held-out calibration text: {damage}.\n"
        f"Calibrated on {text}, seed {found.seed}.{cache}\n\n"
        "```python\nimport trimbit  # makes transformers know this format\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this directory")\n```\n\n'
        "`plan.json` says what was cut and how many bits each weight has, `recipe.yaml` how that was decided.\n"
    )


def weight_nbytes(folder: Path) -> int:
    """Bytes of the weight files in a directory, headers included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def is_compressed(folder: Path) -> bool:
    """Whether a directory holds a compressed model."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == METHOD)
    except (OSError, ValueError, AttributeError):
        return False
