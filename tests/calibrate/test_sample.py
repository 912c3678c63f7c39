"""Text sampled from a tiny model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chats import ASSISTANT, BOS, END, EOS, USER, make_tokenizer
from trimbit.calibrate import sample as sampling
from trimbit.errors import DataError, NumericsError


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5,
        bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def favour(model: LlamaForCausalLM, token: int, amount: float = 2.0) -> None:
    """Makes a token likelier, whatever came before."""
    bias = torch.zeros(40)
    bias[token] = amount
    model.lm_head.register_forward_hook(lambda _module, _inputs, out: out + bias)


def test_self_is_repeatable_and_trainable(model: LlamaForCausalLM) -> None:
    tokenizer, steps = make_tokenizer(), []
    one = sampling.sample_self(
        model, tokenizer, rows=5, length=24, seed=1, batch=2, progress=lambda *s: steps.append(s)
    )
    again = sampling.sample_self(model, tokenizer, rows=5, length=24, seed=1, batch=2)
    other = sampling.sample_self(model, tokenizer, rows=5, length=24, seed=2, batch=2)
    assert one.name == "self"
    assert one.tokens.shape == (5, 24)
    assert one.tokens[:, 0].tolist() == [BOS] * 5
    assert one.digest == again.digest != other.digest
    assert len({tuple(row) for row in one.tokens.tolist()}) == 5
    assert steps == [(i, 72) for i in range(1, 73)]
    model(one.tokens, labels=one.tokens).loss.backward()  # inference tensors would fail here


def test_an_interrupted_row_resumes_with_the_same_tokens(model, tmp_path, monkeypatch) -> None:
    """After any of the segments, here two of 8 tokens for each of two batches."""
    monkeypatch.setattr(sampling, "SEGMENT", 4)
    tokenizer = make_tokenizer(chat=True)
    expected = sampling.sample_self(model, tokenizer, rows=3, length=16, seed=1, batch=2)
    segment, begun = sampling._segment, []
    for stop in (1, 2, 3):
        begun.clear()

        def interrupted(*args, last=stop):
            begun.append(args[3])
            if len(begun) > last:
                raise KeyboardInterrupt
            segment(*args)

        folder = tmp_path / str(stop)
        folder.mkdir()
        monkeypatch.setattr(sampling, "_segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sampling.sample_self(model, tokenizer, rows=3, length=16, seed=1, batch=2, folder=folder)
        assert begun == [0, 8, 0, 8][: stop + 1]
        monkeypatch.setattr(sampling, "_segment", segment)
        resumed = sampling.sample_self(model, tokenizer, rows=3, length=16, seed=1, batch=2, folder=folder)
        assert resumed.digest == expected.digest


def test_self_follows_the_model_without_a_cache(model: LlamaForCausalLM) -> None:
    """Greedy stand-in for the draw: each token must be the uncached argmax of its prefix."""
    favour(model, EOS, -100.0)
    model.lm_head.register_forward_hook(lambda _m, _i, out: out * 1e4)  # the draw is the argmax
    row = sampling.sample_self(model, make_tokenizer(), rows=1, length=20, seed=0).tokens
    assert row[0, 1:].tolist() == model(row).logits[0, :-1].argmax(-1).tolist()


def test_self_draws_from_the_whole_distribution(model: LlamaForCausalLM) -> None:
    tokens = sampling.sample_self(model, make_tokenizer(), rows=4000, length=2, seed=0, batch=4000)
    counts = tokens.tokens[:, 1].bincount(minlength=40) / 4000
    expected = model(torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 0.04


def test_bos_follows_eos(model: LlamaForCausalLM) -> None:
    favour(model, EOS)
    tokens = sampling.sample_self(model, make_tokenizer(), rows=8, length=40, seed=0).tokens
    after = tokens[:, 1:][tokens[:, :-1] == EOS]
    assert len(after) > 5
    assert set(after.tolist()) == {BOS}


def test_eos_alone_is_the_boundary_without_bos(model: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert sampling.sample_self(model, tokenizer, rows=1, length=4, seed=0).tokens[0, 0] == EOS
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither BOS nor EOS"):
        sampling.sample_self(model, tokenizer, rows=1, length=4, seed=0)


@pytest.mark.parametrize("early", [None, END, EOS])
def test_every_other_row_is_a_chat(model: LlamaForCausalLM, early: int | None) -> None:
    for token in (END, EOS, USER, ASSISTANT):
        favour(model, token, 0.0 if token == early else -100.0)
    if early is not None:
        favour(model, early, 1.5)
    rows = sampling.sample_self(model, make_tokenizer(chat=True), rows=9, length=40, seed=0).tokens
    turns = []
    for row in rows[1::2].tolist():
        assert row[:2] == [BOS, USER]
        end = row.index(END)
        assert row[end + 1] == ASSISTANT
        assert not {EOS, USER, ASSISTANT} & set(row[2:end])
        turns.append(end - 2)
    assert max(turns) <= 10
    assert (turns == [10] * 4) == (early is None)
    assert len(set(turns)) > 1 or early is None
    for row in rows[::2].tolist():
        assert row[0] == BOS
        assert row[1] != USER


def test_self_refuses(model: LlamaForCausalLM) -> None:
    plain, chat = make_tokenizer(), make_tokenizer(chat=True)
    with pytest.raises(DataError, match="65 tokens were requested, but the model has only 64 positions"):
        sampling.sample_self(model, plain, rows=1, length=65, seed=0)
    with pytest.raises(DataError, match="needs at least 6 tokens, but rows have 5"):
        sampling.sample_self(model, chat, rows=2, length=5, seed=0)
    chat.chat_template = "<user> fixed <assistant>"
    with pytest.raises(DataError, match="chat template"):
        sampling.sample_self(model, chat, rows=2, length=30, seed=0)
    with pytest.raises(DataError, match="rows is 0"):
        sampling.sample_self(model, plain, rows=0, length=5, seed=0)
    favour(model, 7, float("nan"))
    with pytest.raises(NumericsError, match="1 of 40 logits"):
        sampling.sample_self(model, plain, rows=1, length=5, seed=0)
    with pytest.raises(DataError, match="training mode"):
        sampling.sample_self(model.train(), plain, rows=1, length=5, seed=0)
