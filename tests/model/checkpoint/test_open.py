"""Opening and materialising checkpoints, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from checkpoints import Q, edit, refuses, write
from trimbit.errors import CheckpointError, LayoutError
from trimbit.model.checkpoint.open import materialize, open_checkpoint


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
        ({"model_type": None}, "has no model_type", CheckpointError),
        ({"hidden_size": "many"}, "transformers cannot read it", CheckpointError),
    ],
)
def test_configs_that_are_refused(model: Path, changes: dict[str, object], match: str, error: type[Exception]) -> None:
    edit(model / "config.json", **changes)
    refuses(model, match, error)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_not_json(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    refuses(model, "not JSON|not a JSON object")


def test_known_type_with_auto_map_uses_the_library(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text("raise SystemExit")
    assert type(open_checkpoint(model).config) is LlamaConfig
