"""The transformers plugin: after `import trimbit`, `AutoModelForCausalLM.from_pretrained(directory)` works.

A compressed directory has a `model_type` of its own with the original config nested, so that without this import
transformers refuses it instead of filling the missing weights with random numbers.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimbit.errors import ArtifactError
from trimbit.model.layout import build_layout
from trimbit.runtime import Structure, restructure

METHOD = "trimbit"
FORMAT_VERSION = 1


class TrimbitConfig(PreTrainedConfig):
    """config.json of a compressed directory: the original config under `base`, and the structure of the plan."""

    model_type = METHOD

    def __init__(
        self, base: dict[str, Any] | None = None, structure: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:  # fmt: skip
        if format_version != FORMAT_VERSION:
            raise ArtifactError(f"format version {format_version} of the compressed model is unknown; this trimbit reads {FORMAT_VERSION}")
        super().__init__(**kwargs)
        self.base = base or {}
        self.structure = structure or {}
        self.format_version = format_version

    def original(self) -> PreTrainedConfig:
        """The config of the original model."""
        fields = dict(self.base)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)  # type: ignore[no-any-return]


@register_quantization_config(METHOD)
class TrimbitQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Carries the structure into `from_pretrained`."""

    def __init__(self, structure: dict[str, Any], **_: Any) -> None:  # noqa: ANN401
        self.quant_method = METHOD
        self.structure = structure


@register_quantizer(METHOD)
class TrimbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules of the right shapes into the skeleton before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:  # noqa: ANN401
        restructure(model, build_layout(original_of(model.config)), parse_structure(self.quantization_config.structure))

    def is_serializable(self) -> bool:
        """`save_pretrained` is refused: copy the directory instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """The packed weights are frozen."""
        return False


def original_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The original config behind the one that `from_pretrained` works on."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    fields["tie_word_embeddings"] = fields.pop("trimbit_tied")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)  # type: ignore[no-any-return]


def parse_structure(fields: dict[str, Any]) -> Structure:
    """Strict reading of the structure in config.json."""
    import json

    return Structure.model_validate_json(json.dumps(fields))


class TrimbitForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """What AutoModelForCausalLM finds; loads the original architecture with packed modules."""

    config_class = TrimbitConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: TrimbitConfig | None = None, **kwargs: Any) -> PreTrainedModel:  # noqa: ANN401
        """Load a compressed directory; takes what `from_pretrained` takes."""
        config = config or TrimbitConfig.from_pretrained(path)
        base = config.original()
        base.trimbit_tied = base.tie_word_embeddings
        base.tie_word_embeddings = False  # the head is a module that reads the embedding; there is nothing to tie
        base.quantization_config = {"quant_method": METHOD, "structure": config.structure}
        architecture = AutoModelForCausalLM._model_mapping[type(base)]  # noqa: SLF001
        kwargs.setdefault("dtype", config.dtype or "bfloat16")
        model, info = architecture.from_pretrained(path, *args, config=base, output_loading_info=True, **kwargs)
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if wrong:
            raise ArtifactError(f"{path}: weights and plan disagree on {len(wrong)} tensors, the first is {wrong[0]}")
        return model  # type: ignore[no-any-return]


def register() -> None:
    """Make the Auto classes know compressed directories."""
    AutoConfig.register(METHOD, TrimbitConfig)
    AutoModelForCausalLM.register(TrimbitConfig, TrimbitForCausalLM)


__all__ = ["TrimbitConfig", "TrimbitForCausalLM", "register"]
