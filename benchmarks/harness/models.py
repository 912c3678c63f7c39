"""Take a model off its quantisation grid without changing its function.

The embedded SmolLM2 was stored at 4 bits, so a 4-bit method that hits the same grid would look lossless. Here each
input channel of every projection is scaled by exp(U(-0.35, 0.35)) (ours), and the layer before undoes the scale: the
RMSNorm weight (for q, k, v and gate, up), the rows of up_proj (for down_proj) and the rows of v_proj (for o_proj). The
embedding is not changed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

SPREAD = 0.35  # ours: large enough that no group of 32 weights keeps a common step size
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # those with a plain RMSNorm weight and separate projections
PROBE = "Paris is the capital of France. Bread is flour, water, salt and yeast; it rises because"


def _scale(tensor: Tensor, factor: Tensor, dim: int) -> None:
    """Multiply `tensor` in place along `dim` by `factor`, in float64."""
    shape = [1] * tensor.dim()
    shape[dim] = -1
    tensor.copy_(tensor.double() * factor.view(shape))


def _scale_out(layer: nn.Linear, factor: Tensor) -> None:
    """Multiply the output channels of a linear layer, its bias included, by `factor`."""
    _scale(layer.weight, factor, 0)
    if layer.bias is not None:
        _scale(layer.bias, factor, 0)


@torch.no_grad()
def take_off_grid(model: nn.Module, seed: int) -> None:
    """Rescale the input channels of every projection in place, without changing the model's function.

    Args:
        model: A float32 causal LM of one of `FAMILIES`.
        seed: Seed of the scales; the same seed gives the same weights.

    Raises:
        ValueError: If the model is of another family, for which these identities may not hold.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(f"model type {config.model_type!r}: off-grid scaling knows {FAMILIES}")
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        return torch.exp((2 * uniform - 1) * SPREAD)

    groups = config.num_attention_heads // config.num_key_value_heads
    blocks: Any = model.get_submodule("model.layers")
    for block in blocks:
        attn, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = draw(norm.weight.numel())
            _scale(norm.weight, 1 / s, 0)
            for layer in readers:
                _scale(layer.weight, s, 1)
        s = draw(mlp.down_proj.in_features)
        _scale_out(mlp.up_proj, 1 / s)
        _scale(mlp.down_proj.weight, s, 1)
        s = draw(attn.v_proj.out_features)  # by KV head, because its query heads share it
        _scale_out(attn.v_proj, 1 / s)
        per_head = s.view(config.num_key_value_heads, 1, -1).expand(-1, groups, -1).reshape(-1)
        _scale(attn.o_proj.weight, per_head, 1)


def load(source: Path) -> tuple[Any, Any]:
    """Read a float32 model and its tokenizer from a directory or a .gguf file."""
    if source.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else it counts as quantised and cannot be saved
    )
    return model.eval(), AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def write_off_grid(source: Path, out: Path, seed: int) -> None:
    """Write the off-grid model as a directory in bf16, and print how much its logits changed."""
    model, tokenizer = load(source)
    probe = torch.tensor([tokenizer(PROBE, add_special_tokens=False).input_ids])
    with torch.no_grad():
        before = model(probe).logits
        take_off_grid(model, seed)
        scaled = model(probe).logits
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        written, _ = load(out)
        cast = written(probe).logits
    print(f"seed {seed}, {probe.numel()} tokens, max |logit| {before.abs().max():.2f}")
    print("max |logit difference|, computed in float32:")
    print(f"  before the cast {(scaled - before).abs().max():.2e}")
    print(f"  after the cast to bf16 {(cast - before).abs().max():.2e}")
