"""What a checkpoint knows of itself: metadata, hashes, tokenizer."""

import hashlib
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import Q, edit, refuses, write
from trimbit.errors import CheckpointError
from trimbit.model.checkpoint.open import open_checkpoint


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


def test_non_finite_values_are_counted(tmp_path: Path) -> None:
    state = write(tmp_path / "m")
    state[Q][0, :3] = float("nan")
    state[Q][5, 7] = -float("inf")
    save_file(state, tmp_path / "m/model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=rf"{Q}.*3 NaN and 1 Inf values of 4096"):
        checkpoint.tensor(Q)


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


def test_a_snapshot_of_the_hubs_cache_has_the_models_id(model: Path, tmp_path: Path) -> None:
    """Its folder is named by a commit; a link to it, too, is the model."""
    snapshot = tmp_path / "models--org--Tiny-1" / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (tmp_path / "mine").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "mine"):
        assert open_checkpoint(path).model_id == "org/Tiny-1"
