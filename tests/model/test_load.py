"""Reading original checkpoints: exact values from each kind of source, and every refusal."""

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from trimbit.errors import CheckpointError, LayoutError
from trimbit.model.checkpoint.open import materialize, open_checkpoint

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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path / "tiny")
    return tmp_path / "tiny"


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


def test_metadata_and_sidecars(model: Path) -> None:
    assert open_checkpoint(model).license is None
    carried = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"]
    for name in [*carried, "notes.txt", "training_args.bin"]:
        (model / name).write_text("{}")
    (model / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Tiny\n")
    checkpoint = open_checkpoint(model)
    assert [file.name for file in checkpoint.sidecars()] == carried
    assert (checkpoint.model_id, checkpoint.license) == ("tiny", "mit")
    edit(model / "config.json", _name_or_path="org/Tiny-1")
    assert open_checkpoint(model).model_id == "org/Tiny-1"


def test_hashes(model: Path, tmp_path: Path) -> None:
    first = open_checkpoint(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    edit(copy / "config.json", dtype="float32", _name_or_path="a/b", transformers_version="5.0")
    again = open_checkpoint(copy)
    assert first.config_hash() == again.config_hash()
    assert first.weights_hash() == again.weights_hash()
    edit(copy / "config.json", rms_norm_eps=0.5)
    state = load_file(copy / "model.safetensors")
    save_file(state | {Q: state[Q] * 2}, copy / "model.safetensors")
    changed = open_checkpoint(copy)
    assert first.config_hash() != changed.config_hash()
    assert first.weights_hash() != changed.weights_hash()
    content = hashlib.sha256((model / "model.safetensors").read_bytes()).digest()
    assert first.weights_hash() == hashlib.sha256(content).hexdigest()


def test_materialize(tmp_path: Path) -> None:
    state = write(tmp_path / "m", tied=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(checkpoint.config)
    layer = whole.model.layers[1]
    materialize(layer, checkpoint, "model.layers.1.", torch.float32)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[f"model.layers.1.{name}"].float()), name
    assert whole.model.layers[0].mlp.up_proj.weight.is_meta
    materialize(whole, checkpoint, "", torch.bfloat16)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert all(torch.equal(p, state[name]) for name, p in whole.named_parameters())
    assert whole.model.rotary_emb.inv_freq.is_meta  # a non-persistent buffer: left alone


def test_materialize_errors(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    with pytest.raises(CheckpointError, match=r"\(64, 64\).*\(8, 64\)"):
        materialize(
            torch.nn.Linear(64, 8, bias=False, device="meta"),
            checkpoint,
            Q.removesuffix("weight"),
            torch.float32,
        )
    with pytest.raises(CheckpointError, match=r"no tensor 'nowhere\.weight'"):
        materialize(torch.nn.Linear(2, 2, device="meta"), checkpoint, "nowhere.", torch.float32)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    state = write(tmp_path / "m", dtype=torch.float32)
    state["model.norm.weight"][3] = 1e6
    save_file(state, tmp_path / "m/model.safetensors")
    norm = torch.nn.RMSNorm(64, device="meta")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*0 NaN and 1 Inf"):
        materialize(norm, open_checkpoint(tmp_path / "m"), "model.norm.", torch.float16)


def test_non_finite_values_are_counted(tmp_path: Path) -> None:
    state = write(tmp_path / "m")
    state[Q][0, :3] = float("nan")
    state[Q][5, 7] = -float("inf")
    save_file(state, tmp_path / "m/model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=rf"{Q}.*3 NaN and 1 Inf values of 4096"):
        checkpoint.tensor(Q)


def refuses(path: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    refuses(tmp_path / "org/name", "not downloaded")
    refuses(tmp_path, "no config.json")
    (tmp_path / "model.pt").touch()
    refuses(tmp_path / "model.pt", "convert it to safetensors")
    (tmp_path / "model.txt").touch()
    refuses(tmp_path / "model.txt", "neither a directory nor a .gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt"])
def test_pickles_are_refused(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    refuses(model, "no model.safetensors")
    (model / name).touch()
    refuses(model, rf"only pickled weights \({name}\)")


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"model_type": "trimbit"}, "already compressed by trimbit", CheckpointError),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"already quantised \(method gptq\)",
            CheckpointError,
        ),
        ({"model_type": "lama"}, "nearest .* 'llama'", LayoutError),
        ({"model_type": "mine", "auto_map": {}}, "needs remote code", CheckpointError),
        ({"model_type": None}, "names no model_type", CheckpointError),
        ({"hidden_size": "many"}, "transformers refuses it", CheckpointError),
    ],
)
def test_configs_that_are_refused(model: Path, changes: dict[str, object], match: str, error: type[Exception]) -> None:
    edit(model / "config.json", **changes)
    refuses(model, match, error)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_not_json(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    refuses(model, "not JSON|not an object")


def test_known_type_with_auto_map_uses_the_library(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text("raise SystemExit")
    assert type(open_checkpoint(model).config) is LlamaConfig


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


def test_broken_model_card(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    refuses(model, "front matter is not YAML")


def test_no_tokenizer(model: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        open_checkpoint(model).tokenizer()


def test_tokenizer(model: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(model)
    assert open_checkpoint(model).tokenizer()("b a c")["input_ids"] == [2, 1, 0]
