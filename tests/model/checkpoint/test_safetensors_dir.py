"""Directories of safetensors files: what is read, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import Q, assert_same, refuses, write, write_sharded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_file(tmp_path: Path, dtype: torch.dtype, *, tied: bool) -> None:
    state = write(tmp_path / "m", tied=tied, dtype=dtype)
    assert ("lm_head.weight" in state) is not tied
    assert_same(tmp_path / "m", state)


def test_tied_duplicate_and_recomputed_buffer_are_dropped(tmp_path: Path) -> None:
    state = write(tmp_path / "m", tied=True)
    extra = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(state | extra, tmp_path / "m/model.safetensors")
    assert_same(tmp_path / "m", state)


def test_sharded(tmp_path: Path) -> None:
    state = write_sharded(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert_same(tmp_path / "m", state)


@pytest.mark.parametrize("keep", [0, 5, 300, -8])
def test_safetensors_truncated(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(model, "truncated or corrupt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_dtypes_are_refused(model: Path, dtype: torch.dtype) -> None:
    file = model / "model.safetensors"
    state = load_file(file)
    save_file(state | {Q: state[Q].to(dtype)}, file)
    refuses(model, rf"{Q}' has dtype (I8|F8_E4M3)")


def test_index_errors(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_sharded(path)
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    weight_map = good["weight_map"]
    shard = weight_map[Q]
    index.write_text(json.dumps({"weight_map": weight_map | {"absent": shard}}))
    refuses(path, "'absent' is in the index but not here")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != Q}}))
    refuses(path, "not in the index|not in the directory")
    index.write_text("{}")
    refuses(path, "no weight_map")
    index.write_text(json.dumps({"weight_map": weight_map | {Q: f"../m/{shard}"}}))
    refuses(path, "not in the directory")
    index.write_text(json.dumps(good))
    (path / shard).unlink()
    refuses(path, f"shard '{shard}' is not in the directory")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("lm_head.weight"), "'lm_head.weight' is missing; download the model again"),
        (lambda state: state.pop(Q), f"'{Q}' is missing"),
        (lambda state: [state.pop(name) for name in [*state][:3]], "is missing, and 2 more"),
        (
            lambda state: state.update({Q.replace("layers.1", "layers.7"): state[Q].clone()}),
            "have 8 blocks, but the config says 2; .* the same model",
        ),
        (lambda state: state.update({f"{Q[:-6]}bias": torch.ones(4)}), "q_proj.bias' is not part of the model"),
        (lambda state: state.update({Q: state[Q][:-1].clone()}), f"'{Q}' has shape .* but the model needs"),
    ],
    ids=["head", "weight", "weights", "more blocks", "bias", "shape"],
)
def test_files_hold_the_model_of_the_config_and_nothing_else(model: Path, change, words: str) -> None:
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors")
    refuses(model, words)
