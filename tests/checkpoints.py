"""Tiny checkpoints as files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from trimbit.errors import CheckpointError
from trimbit.model.checkpoint.open import open_checkpoint

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
}


Q = "model.layers.1.self_attn.q_proj.weight"


State = dict[str, torch.Tensor]


def tiny(config: PreTrainedConfig) -> State:
    """Random values on a grid of 1/64, so that adding and taking away one is exact."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: torch.randint(-64, 65, p.shape).float() / 64 for name, p in model.named_parameters()}


def write(path: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> State:
    path.mkdir()
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    config.save_pretrained(path)
    state = {name: value.to(dtype) for name, value in tiny(config).items()}
    save_file(state, path / "model.safetensors")
    return state


def write_sharded(path: Path) -> State:
    path.mkdir()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32)
    model.save_pretrained(path, max_shard_size="50KB")
    return {name: p.detach() for name, p in model.named_parameters()}


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same(path: Path, state: State) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == state.keys()
    for name, value in state.items():
        got = checkpoint.tensor(name)
        assert got.dtype == value.dtype
        assert checkpoint.shape(name) == tuple(got.shape)
        assert torch.equal(got, value), name
        assert got.untyped_storage().nbytes() == got.nbytes  # not a view of the mapped file


def refuses(path: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
