"""What each half of a block adds to the stream, and the prediction, against hooks on the whole model."""

import pytest
import torch

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.measure.criteria.mutual_information import Config, information
from trimbit.measure.layer_importance import layer_information
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream

TOKENS = torch.randint(3, VOCAB, (40, 24), generator=torch.Generator().manual_seed(0))
SECOND_HALF = {"llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm"}  # what reads its input


@pytest.mark.parametrize("family", SECOND_HALF)
def test_it_is_of_increments_and_of_the_next_token(tmp_path, family):
    model = tiny_model(family).bfloat16().float()
    save_tiny(model.bfloat16(), tmp_path / "original")
    model = model.float()
    seen = {}

    def listen(at, what):
        def hook(_module, inputs, _output=None):
            seen[at, what] = inputs[0].detach()

        return hook

    for at, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(listen(at, "first half"))
        getattr(block, SECOND_HALF[family]).register_forward_pre_hook(listen(at, "second half"))
    model.model.norm.register_forward_pre_hook(listen(len(model.model.layers), "first half"))
    with torch.no_grad():
        predicted = model(TOKENS).logits[:, 1:].argmax(-1).flatten()

    def told(before, after):
        return information((after - before)[:, 1:].flatten(0, 1), predicted, Config(classes=8))

    want = {}
    for at in range(len(model.model.layers)):
        begin, middle, end = seen[at, "first half"], seen[at, "second half"], seen[at + 1, "first half"]
        want |= {f"blocks.{at}.attn": told(begin, middle), f"blocks.{at}.mlp": told(middle, end)}
        want[f"blocks.{at}"] = told(begin, end)

    checkpoint = open_checkpoint(tmp_path / "original")
    stream = BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)
    found = layer_information(stream, stream.load, TOKENS, Config(classes=8), lambda *_: None)
    assert found == pytest.approx(want, abs=0.01)
    assert max(want.values()) - min(want.values()) > 0.05  # layers differ by more than that
