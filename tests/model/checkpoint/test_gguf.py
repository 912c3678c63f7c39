"""GGUF files."""

import hashlib
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from checkpoints import SIZES, Q, State, assert_same, tiny
from trimbit.errors import CheckpointError, LayoutError
from trimbit.model.checkpoint.open import open_checkpoint


def write_gguf(file: Path, state: State, arch: str) -> State:
    """Writes llama.cpp's layout; returns the values a reader should give back."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("Tiny Model")
    writer.add_license("apache-2.0")
    writer.add_vocab_size(64)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if arch == "llama":
        writer.add_rope_dimension_count(16)
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(kind, 2)
    expected = {}
    for name, value in state.items():
        known = names.get_name(name.removesuffix(".weight"))
        target = f"{known}.weight" if known else name
        array = value.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2  # convert_hf_to_gguf.py: LlamaModel.permute
            array = array.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(array.shape)
        if arch == "gemma2" and "norm" in name:
            array = array + 1
        if "mlp" in name:
            quant = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quantize(array, quant)
            expected[name] = torch.from_numpy(gguf.dequantize(blocks, quant))
            writer.add_tensor(target, blocks, raw_dtype=quant)
        else:
            expected[name] = value
            half = "v_proj" in name
            writer.add_tensor(target, np.ascontiguousarray(array, np.float16 if half else None))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def llama_gguf(tmp_path: Path) -> tuple[Path, State]:
    file = tmp_path / "g" / "tiny.gguf"
    file.parent.mkdir()
    return file, write_gguf(file, tiny(LlamaConfig(**SIZES)), "llama")


def test_gguf_llama_unpermutes_q_and_k(llama_gguf: tuple[Path, State]) -> None:
    file, state = llama_gguf
    assert_same(file, state)
    assert_same(file.parent, state)  # the directory that holds only this
    checkpoint = open_checkpoint(file)
    assert (checkpoint.model_id, checkpoint.license) == ("Tiny Model", "apache-2.0")
    assert checkpoint.config.model_type == "llama"
    assert checkpoint.sidecars() == []
    content = hashlib.sha256(file.read_bytes()).digest()
    assert checkpoint.weights_hash() == hashlib.sha256(content).hexdigest()


def test_gguf_gemma2_norms_lose_their_one(tmp_path: Path) -> None:
    state = tiny(Gemma2Config(**SIZES))
    assert "lm_head.weight" not in state
    assert_same(tmp_path / "m.gguf", write_gguf(tmp_path / "m.gguf", state, "gemma2"))


def test_gguf_tensor_without_counterpart_is_refused(tmp_path: Path) -> None:
    state = tiny(LlamaConfig(**SIZES)) | {"extra_freqs.weight": torch.ones(8)}
    write_gguf(tmp_path / "m.gguf", state, "llama")
    with pytest.raises(CheckpointError, match=r"extra_freqs\.weight.*no counterpart"):
        open_checkpoint(tmp_path / "m.gguf")


def test_gguf_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    state = tiny(LlamaConfig(**SIZES))
    del state[Q]
    write_gguf(tmp_path / "m.gguf", state, "llama")
    with pytest.raises(CheckpointError, match=rf"{Q}' is missing"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_gguf_truncated(llama_gguf: tuple[Path, State], keep: int) -> None:
    file, _ = llama_gguf
    data = file.read_bytes()
    file.write_bytes(data[:keep] if keep >= 0 else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(file)


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2x")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LayoutError, match=r"'qwen2x'.*'qwen2'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_several_ggufs(llama_gguf: tuple[Path, State]) -> None:
    file, _ = llama_gguf
    shutil.copy(file, file.with_name("two.gguf"))
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(tiny.gguf, two.gguf\)"):
        open_checkpoint(file.parent)
