"""Tiny random models of each family; every parameter is far enough from neutral to matter."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<unk>", "<s>", "</s>")
VOCAB = 96
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
GEMMA = {
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OWN = {
    "mistral": {"sliding_window": None},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """3 layers of width 48, 6 query heads on 3 kv heads of 8 channels, 80 mid channels; `changes` of other fields."""
    fields = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 80,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    shape = {} if model_type == "phi3" else {"head_dim": 8}  # phi3 has hidden / heads, also 8
    config = AutoConfig.for_model(model_type, **fields | shape | OWN.get(model_type, {}) | changes)
    # transformers refuses sdpa for gemma2: it cannot cap the attention logits
    config._attn_implementation = "eager" if model_type == "gemma2" else "sdpa"
    return config


def tiny_model(model_type: str, seed: int = 0, tied: bool | None = None, **changes: Any) -> PreTrainedModel:
    """A float32 model in eval mode; `tied` overrides whether the family ties head and embedding."""
    config = tiny_config(model_type, **changes)
    if tied is not None:
        config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter: norms around neutral, biases non-zero, matrices 1/sqrt(in).

    Gemma multiplies the embedding by sqrt(width) and ties the head to it. So its table is small, lest every token
    predict itself whatever the blocks do, and its final norm is large, so that logits still differ.
    """
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    neutral = 0.0 if gemma else 1.0  # Gemma's norm is 1 + w
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_norm = name.endswith("norm.weight")
            mean = 1.5 if gemma and name == "model.norm.weight" else neutral if is_norm else 0.0
            parameter.copy_(mean + 0.3 * noise)
            assert is_norm or name.endswith("bias"), name
        elif "embed" in name:
            parameter.copy_((0.15 if gemma else 0.5) * noise)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)


def tiny_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word: `w3` is token 3, up to `w95`; `adds_bos` as Gemma's tokenizer does."""
    vocab = {word: i for i, word in enumerate(SPECIAL)}
    vocab |= {f"w{i}": i for i in range(len(SPECIAL), VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    # transformers reads every qwen2 tokenizer as byte-level BPE; added words survive that
    words = [AddedToken(word, single_word=True, lstrip=True) for word in vocab]
    tokenizer.add_tokens(words)
    unk, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk
    )


def save_tiny(model: PreTrainedModel, path: Path, adds_bos: bool = False) -> None:
    """Write `model` and a tokenizer of its vocabulary as an ordinary Hugging Face directory."""
    model.save_pretrained(path)
    tiny_tokenizer(adds_bos).save_pretrained(path)
