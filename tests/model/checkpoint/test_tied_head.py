"""A head that is stored although the config ties it: transformers keeps it where it differs, and so does trimbit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plans import make_plan, runs
from tiny import VOCAB, save_tiny, tiny_model
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import CheckpointError
from trimbit.model.build import build_layout
from trimbit.model.checkpoint import tied_head
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.model.resolved import resolve
from trimbit.runtime.load import load_model
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import WeightCompressor
from written import writing

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tied(tmp_path):
    """A directory whose config ties the head, and its tensors."""
    save_tiny(tiny_model("llama", tied=True), tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    return tmp_path / "m", load_file(file)


def rewrite(path, state):
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(path)


def head_of(state):
    """One value differs, in the last row."""
    head = state[EMBED].clone()
    head[-1, -1] += 0.5
    return head


@pytest.mark.parametrize("rows", [7, 4096])
def test_a_head_that_differs_is_kept_and_one_that_is_equal_is_not(tied, monkeypatch, caplog, rows):
    monkeypatch.setattr(tied_head, "_ROWS", rows)
    path, state = tied
    same = rewrite(path, state | {HEAD: state[EMBED].clone()})
    assert HEAD not in same.names
    assert build_layout(same.config).tied
    assert not caplog.records
    other = rewrite(path, state | {HEAD: head_of(state)})
    assert torch.equal(other.tensor(HEAD), head_of(state))
    layout = build_layout(other.config)
    assert not layout.tied
    assert layout.parameters == build_layout(same.config).parameters + state[EMBED].numel()
    assert "their values differ" in caplog.text
    assert other.config_hash() != same.config_hash()


def test_values_are_compared_not_types(tied):
    path, state = tied
    whole = state[EMBED].half().float()
    assert HEAD not in rewrite(path, state | {EMBED: whole, HEAD: whole.half()}).names
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' has shape"):
        rewrite(path, state | {EMBED: whole, HEAD: whole[:, :40].half()})


def test_a_head_alone_is_the_embedding_too(tied):
    path, state = tied
    alone = {name: value for name, value in state.items() if name != EMBED}
    checkpoint = rewrite(path, alone | {HEAD: state[EMBED]})
    assert HEAD not in checkpoint.names
    assert torch.equal(checkpoint.tensor(EMBED), state[EMBED])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight, state[EMBED])


@torch.no_grad()
def test_it_runs_is_packed_and_is_counted_as_transformers_has_it(tied, tmp_path):
    path, state = tied
    checkpoint = rewrite(path, state | {HEAD: head_of(state)})
    reference = AutoModelForCausalLM.from_pretrained(path)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
    want = reference(TOKENS).logits
    assert torch.equal(load_model(path, torch.float32)(TOKENS).logits, want)
    layout = build_layout(checkpoint.config)
    plan = make_plan(layout, lambda _, cols: runs((cols, "uint8g32")))
    method = WeightCompressor(module=rtn, config=rtn.Config())
    with writing(tmp_path / "small", layout, plan) as writer:
        apply_plan(
            BlockStream(checkpoint, layout, torch.float32), plan, TOKENS, method, refit.Config(), None, writer,
            lambda *_: None,
        )  # fmt: skip
    assert weight_nbytes(tmp_path / "small") == resolve(plan, layout).file_nbytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    dense = model.lm_head.dense(torch.float32)
    torch.testing.assert_close(dense, head_of(state), atol=0.02, rtol=0)
    found = model(TOKENS).logits
    assert (found - want).square().mean() < 1e-3 * want.square().mean()
