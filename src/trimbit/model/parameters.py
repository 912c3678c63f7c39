"""Names and shapes of a model's parameters, from its config."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trimbit.model.families import FAMILIES


def parameter_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by its name in transformers; without a tied head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        family = FAMILIES.get(config.model_type)
        shapes.pop(f"{family.head if family else 'lm_head'}.weight", None)
    return shapes
