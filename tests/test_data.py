"""Token sets: reading, windows, draws, and text sampled from a tiny model."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimbit.calibrate import sample as sampling
from trimbit.calibrate import text as texts
from trimbit.calibrate.text import TokenSet
from trimbit.errors import DataError, NumericsError

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
BOS, EOS, END, USER, ASSISTANT = range(5)
VOCAB = {"<s>": 0, "</s>": 1, "<end>": 2, "<user>": 3, "<assistant>": 4}
VOCAB |= {f"w{i}": i for i in range(5, 40)}
TEMPLATE = (
    "{% for m in messages %}<s> <user> {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def make_tokenizer(*, chat: bool = False, add_bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel(VOCAB, unk_token="w5"))
    core.pre_tokenizer = WhitespaceSplit()
    if add_bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_max_length=16)
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def words(count: int) -> str:
    return " ".join(f"w{5 + i % 31}" for i in range(count))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_plain_text_is_used_as_it_is(tmp_path: Path, name: str) -> None:
    raw = "é\r\n\n x \u2028\n"
    payload = gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode()
    (tmp_path / name).write_bytes(payload)
    assert texts.read_text(tmp_path / name) == raw


def test_raw_lines_become_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.raw", " \n = T = \n \n one\u2028two \n")
    assert texts.read_text(path) == "\n\n = T = \n\n\n\n\n one\u2028two \n"
    assert texts.read_text(write(tmp_path / "b.raw", "a\nb")) == "a\n\n\nb"


def test_wikitext_has_the_published_bytes() -> None:
    path = SHARED / "wikitext-2" / "wiki.test.raw"
    if not path.exists():
        pytest.skip("no shared data here")
    assert len(texts.read_text(path).encode()) == 1_296_370
    pages = texts.read_text(SHARED / "text" / "c4_en_300.jsonl.gz")
    assert pages.count("\n\n") >= 299


def test_jsonl_takes_the_first_known_key(tmp_path: Path) -> None:
    rows = [
        {"page": "p", "text": "t"}, {"content": "c", "page": "p"}, {"content": "c"},
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "input": "n", "output": "o"},
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert texts.read_text(path) == "t\n\np\n\nc\n\ni\no\n\ni\nn\no"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"title": 1}', r"a\.jsonl, line 2: found 'title'; needs"),
        ("a.jsonl", b'{"text": null}', "line 1: found 'text'"),
        ("a.jsonl", b"[1]", "line 1: found list"),
        ("a.jsonl", b'\n{"text"', "line 2: not valid JSON"),
        ("a.txt", b"\xff\xfe", "utf-8"),
        ("a.txt.gz", b"not gzip", "gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "gzip"),
        ("a.csv", b"x", r"'\.csv'; known are \.txt, \.md, \.raw, \.jsonl"),
        ("a.gz", b"x", r"known are \.txt"),
        ("a.txt", None, r"no such file; known are \.txt"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        texts.read_text(tmp_path / name)


def test_windows() -> None:
    ids = torch.arange(10)
    assert texts.windows(ids, 4, bos=None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    expected = [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert texts.windows(ids, 4, bos=99).tolist() == expected
    assert texts.windows(ids, 11, bos=99).tolist() == [[99, *range(10)]]
    with pytest.raises(DataError, match="10 tokens found, 11 needed"):
        texts.windows(ids, 11, bos=None)
    with pytest.raises(DataError, match="at least 1"):
        texts.windows(ids, 1, bos=99)


def test_encode_adds_nothing_and_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(add_bos=True)
    ids = texts.encode(words(100), tokenizer)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [5 + i % 31 for i in range(100)]
    assert not caplog.records
    assert not tokenizer.deprecation_warnings


def test_default_bos_is_what_the_tokenizer_does() -> None:
    assert texts.default_bos(make_tokenizer()) is None
    assert texts.default_bos(make_tokenizer(add_bos=True)) == BOS


def test_evaluation_windows_are_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", words(31))
    found = texts.evaluation_windows(path, make_tokenizer(add_bos=True), context=6, limit=None)
    assert found[:, 0].tolist() == [BOS] * 6
    assert found[:, 1:].flatten().tolist() == list(range(5, 35))
    two = texts.evaluation_windows(path, make_tokenizer(), context=6, limit=2)
    assert two.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    with pytest.raises(DataError, match=r"a\.txt: 31 tokens found, 32 needed"):
        texts.evaluation_windows(path, make_tokenizer(), context=32, limit=None)
    with pytest.raises(DataError, match="limit is 0"):
        texts.evaluation_windows(path, make_tokenizer(), context=6, limit=0)


def test_from_file_draws_different_windows_by_seed(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.txt", words(31)), make_tokenizer()
    one = texts.from_file(path, tokenizer, rows=10, length=3, seed=1)
    again = texts.from_file(path, tokenizer, rows=10, length=3, seed=1)
    other = texts.from_file(path, tokenizer, rows=10, length=3, seed=2)
    assert (one.name, one.seed) == ("a.txt", 1)
    assert one.digest == again.digest != other.digest
    starts = one.tokens[:, 0].tolist()
    assert sorted(starts) == list(range(5, 35, 3))  # all windows, each once
    assert starts != sorted(starts)
    fewer = texts.from_file(path, tokenizer, rows=4, length=3, seed=1)
    assert torch.equal(fewer.tokens, one.tokens[:4])
    with pytest.raises(DataError, match=r"11 rows of 3 tokens asked, the text has 10"):
        texts.from_file(path, tokenizer, rows=11, length=3, seed=1)


def test_digest_and_split() -> None:
    tokens = torch.arange(12).reshape(4, 3)
    whole = TokenSet(name="x", tokens=tokens, seed=3)
    expected = b"4x3:" + b"".join(i.to_bytes(8, "little") for i in range(12))
    assert whole.digest == hashlib.sha256(expected).hexdigest()
    assert whole.digest != TokenSet(name="x", tokens=tokens.reshape(3, 4), seed=3).digest
    first, last = whole.split(1)
    assert torch.equal(first.tokens, tokens[:3])
    assert torch.equal(last.tokens, tokens[3:])
    for held_out in (-1, 0, 4):
        with pytest.raises(DataError, match=f"{held_out} of 4 rows"):
            whole.split(held_out)


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
    with pytest.raises(DataError, match="65 tokens asked, the model has 64 positions"):
        sampling.sample_self(model, plain, rows=1, length=65, seed=0)
    with pytest.raises(DataError, match="takes 6 tokens or more, rows have 5"):
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
