"""The transformers plugin: after `import trimbit`, `AutoModelForCausalLM.from_pretrained(directory)` works.

A compressed directory has its own `model_type`, with the original config nested. So without this import transformers
refuses it, instead of filling the missing weights with random numbers.

`import transformers` loads this module (see `registration.py`) and waits for it. Modules of this package that import
transformers are therefore imported when a model is loaded, not here. Otherwise a thread that imports one of them and a
thread that imports transformers could wait for each other forever.
"""

import json
from os import PathLike
from typing import Any

from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimbit.artifact.files import FORMAT_VERSION, MODEL_TYPE
from trimbit.errors import ArtifactError
from trimbit.schema.base import first_problem
from trimbit.schema.structure import Structure


class TrimbitConfig(PreTrainedConfig):
    """config.json of a compressed directory: the original config under `base`, and the structure of the plan."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        structure: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ArtifactError(
                f"the compressed model has format version {format_version}, but this version of trimbit reads only "
                f"{FORMAT_VERSION}; install a matching version, or compress the model again"
            )
        super().__init__(**kwargs)
        self.base = base or {}
        self.structure = structure or {}
        self.format_version = format_version

    def original(self) -> PreTrainedConfig:
        """The config of the original model."""
        fields = dict(self.base)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)


@register_quantization_config(MODEL_TYPE)
class TrimbitQuantizationConfig(QuantizationConfigMixin):
    """Carries the structure into `from_pretrained`."""

    def __init__(self, structure: dict[str, Any], **_: Any) -> None:  # noqa: ANN401
        self.quant_method = MODEL_TYPE  # type: ignore[assignment] # transformers' enum is closed
        self.structure = structure


@register_quantizer(MODEL_TYPE)
class TrimbitQuantizer(HfQuantizer):
    """Puts packed modules of the right shapes into the model before its weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:  # noqa: ANN401
        from trimbit.model.build import build_layout
        from trimbit.runtime.restructure import restructure

        config: Any = self.quantization_config
        restructure(model, build_layout(original_config(model.config)), parse_structure(config.structure))

    def is_serializable(self) -> bool:
        """False: `save_pretrained` is refused; copy the directory instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: the packed weights are frozen."""
        return False


def original_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The original config, restored from the one that `from_pretrained` works on."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    fields["tie_word_embeddings"] = fields.pop("trimbit_tied")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def parse_structure(fields: dict[str, Any]) -> Structure:
    """Read the structure in config.json strictly.

    Raises:
        ArtifactError: if it has an unknown key or a wrong type.
    """
    try:
        return Structure.model_validate_json(json.dumps(fields))
    except ValidationError as err:
        raise ArtifactError(f"config.json: structure.{first_problem(err)}") from err


class TrimbitForCausalLM(PreTrainedModel, GenerationMixin):
    """The class that AutoModelForCausalLM finds; it loads the original architecture with packed modules."""

    config_class = TrimbitConfig

    @classmethod
    def from_pretrained(  # type: ignore[override] # returns the original's class, not this one
        cls,
        path: str | PathLike[str],
        *args: Any,  # noqa: ANN401
        config: TrimbitConfig | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> PreTrainedModel:
        """Load a compressed directory; takes the arguments of `from_pretrained`.

        Raises:
            ArtifactError: if tensors are missing or left over, or the structure is not valid.
        """
        from trimbit.runtime.kv_cache import pack_cache

        config = config or TrimbitConfig.from_pretrained(path)
        base = config.original()
        base.trimbit_tied = base.tie_word_embeddings
        base.tie_word_embeddings = False  # the head is a module that reads the embedding: nothing to tie
        base.quantization_config = {"quant_method": MODEL_TYPE, "structure": config.structure}
        architecture: Any = AutoModelForCausalLM._model_mapping[type(base)]
        if kwargs.get("dtype") in {None, "auto"}:  # the dtype of these files, not of the original's
            kwargs["dtype"] = config.dtype or "bfloat16"
        model, info = architecture.from_pretrained(path, *args, config=base, output_loading_info=True, **kwargs)
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if wrong:
            raise ArtifactError(
                f"{path}: the weight files and config.json disagree on {len(wrong)} tensors, the first is {wrong[0]}; "
                "compress the model again"
            )
        kv_cache = parse_structure(config.structure).kv_cache
        if kv_cache is not None:
            pack_cache(model, kv_cache)
        return model  # type: ignore[no-any-return]


def register() -> None:
    """Make the Auto classes know compressed directories; may be called again."""
    AutoConfig.register(MODEL_TYPE, TrimbitConfig, exist_ok=True)
    AutoModelForCausalLM.register(TrimbitConfig, TrimbitForCausalLM, exist_ok=True)


__all__ = ["TrimbitConfig", "TrimbitForCausalLM", "register"]
