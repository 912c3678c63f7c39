"""The text that comes with the package: prose of several kinds, program code, and chats; `texts/SOURCES.md` lists them.

It is what a model can be fitted to without a file and without hours of sampling.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimbit.calibrate.text import TokenSet, draw_rows, encode, read_rows
from trimbit.errors import DataError

NAME = "builtin"
FOLDER = Path(__file__).parent / "texts"


def builtin_text(tokenizer: Any, *, rows: int, length: int, seed: int) -> TokenSet:  # noqa: ANN401
    """Draw `rows` different windows of `length` tokens, in a random order.

    Chats are written by the tokenizer's chat template, if it has one, and lie between the other documents.

    Raises:
        DataError: if the text has fewer windows than `rows`, or the template cannot be used.
    """
    text = "\n\n".join(_documents(tokenizer))
    return draw_rows(NAME, encode(text, tokenizer), tokenizer, rows=rows, length=length, seed=seed)


def _documents(tokenizer: Any) -> Iterator[str]:  # noqa: ANN401
    """All documents; the chats are spread evenly over the prose."""
    prose, chats = _read("prose"), _read("chats")
    shown = 0
    for number, document in enumerate(prose, start=1):
        yield document["text"]
        while shown < len(chats) * number // len(prose):
            yield _chat(chats[shown]["messages"], tokenizer)
            shown += 1


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> str:  # noqa: ANN401
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as err:  # whatever a template raises
        raise DataError(f"the chat template cannot write a chat of user and assistant: {err}") from err


def _read(name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(FOLDER / f"{name}.jsonl")]
