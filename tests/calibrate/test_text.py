"""Token sets: reading, windows, draws, and text sampled from a tiny model."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch

from chats import BOS, make_tokenizer
from trimbit.calibrate import text as texts
from trimbit.calibrate.text import TokenSet
from trimbit.errors import DataError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


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
        ("a.jsonl", b'{"text": "x"}\n{"title": 1}', r"a\.jsonl, line 2: found 'title', but a row needs"),
        ("a.jsonl", b'{"text": null}', "line 1: found 'text'"),
        ("a.jsonl", b"[1]", "line 1: found list"),
        ("a.jsonl", b'\n{"text"', "line 2: not valid JSON"),
        ("a.txt", b"\xff\xfe", "utf-8"),
        ("a.txt.gz", b"not gzip", "gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "gzip"),
        ("a.csv", b"x", r"'\.csv'; supported are \.txt, \.md, \.raw, \.jsonl"),
        ("a.gz", b"x", r"supported are \.txt"),
        ("a.txt", None, r"no such file; supported are \.txt"),
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
    with pytest.raises(DataError, match="10 tokens, but one window needs 11"):
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
    found = texts.evaluation_windows(path, make_tokenizer(add_bos=True), context=6, max_windows=None)
    assert found[:, 0].tolist() == [BOS] * 6
    assert found[:, 1:].flatten().tolist() == list(range(5, 35))
    two = texts.evaluation_windows(path, make_tokenizer(), context=6, max_windows=2)
    assert two.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    with pytest.raises(DataError, match=r"a\.txt: the text has 31 tokens, but one window needs 32"):
        texts.evaluation_windows(path, make_tokenizer(), context=32, max_windows=None)
    with pytest.raises(DataError, match="max_windows is 0"):
        texts.evaluation_windows(path, make_tokenizer(), context=6, max_windows=0)


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
    with pytest.raises(DataError, match=r"11 rows of 3 tokens were requested, but the text has only 10"):
        texts.from_file(path, tokenizer, rows=11, length=3, seed=1)


def test_digest_and_split() -> None:
    tokens = torch.arange(12).reshape(4, 3)
    whole = TokenSet(name="x", tokens=tokens, seed=3)
    expected = b"4x3:" + b"".join(i.to_bytes(8, "little") for i in range(12))
    assert whole.digest == hashlib.sha256(expected).hexdigest()
    assert whole.digest != TokenSet(name="x", tokens=tokens.reshape(3, 4), seed=3).digest
    first, none, last = whole.split(3, 0, 1)
    assert torch.equal(first.tokens, tokens[:3])
    assert none.tokens.shape == (0, 3)
    assert torch.equal(last.tokens, tokens[3:])
    assert {(part.name, part.seed) for part in (first, none, last)} == {("x", 3)}
    for counts in ((3,), (3, 2), (5,)):
        with pytest.raises(DataError, match=rf"x: parts of .{counts[0]},.* rows were requested, but there are 4 rows"):
            whole.split(*counts)


def test_rows_are_cut_into_pieces_that_are_never_short() -> None:
    rows = TokenSet(name="x", tokens=torch.tensor([[9, 0, 1, 2, 3, 4], [9, 5, 6, 7, 8, 9]]), seed=0)
    assert rows.pieces(2).tokens.tolist() == [[9, 0], [1, 2], [3, 4], [9, 5], [6, 7], [8, 9]]
    assert rows.pieces(4).tokens.tolist() == [[9, 0, 1, 2], [9, 5, 6, 7]]
    with pytest.raises(DataError, match="pieces of 7 tokens were requested, but the rows have 6"):
        rows.pieces(7)
