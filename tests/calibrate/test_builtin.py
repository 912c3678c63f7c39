"""The text that comes with the package."""

import pytest

from chats import make_tokenizer
from trimbit.calibrate import builtin
from trimbit.calibrate.builtin import builtin_text
from trimbit.errors import DataError


def test_rows_depend_on_the_seed_alone() -> None:
    tokenizer = make_tokenizer(chat=True)
    first, again, other = (builtin_text(tokenizer, rows=20, length=512, seed=seed) for seed in (0, 0, 1))
    assert first.name == "builtin"
    assert first.tokens.shape == (20, 512)
    assert first.digest == again.digest != other.digest


def test_chats_lie_between_the_prose_and_are_written_by_the_template() -> None:
    tokenizer, plain = make_tokenizer(chat=True), make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    written = list(builtin._documents(tokenizer))
    chats = [at for at, document in enumerate(written) if document.startswith("[user]")]
    assert len(chats) == len(builtin._read("chats"))
    assert all("[assistant]" in written[at] for at in chats)
    assert (
        max(later - at for at, later in zip([0, *chats], [*chats, len(written)], strict=True)) <= 4
    )  # not in one heap
    assert not any("[user]" in document for document in builtin._documents(plain))


def test_every_chat_is_of_user_and_assistant_in_turn() -> None:
    for chat in builtin._read("chats"):
        roles = [message["role"] for message in chat["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in chat["messages"])


def test_every_source_has_its_licence() -> None:
    licences = (builtin.FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    sources = {document["source"].partition(",")[0] for document in builtin._read("prose")}
    assert len(sources) == 5
    assert {source for source in sources if source not in licences} == set()


def test_it_is_long_enough_for_the_default_recipe() -> None:
    """28 rows of 2,048 tokens; few tokenizers make fewer tokens than one in five characters."""
    assert sum(map(len, builtin._documents(make_tokenizer()))) > 28 * 2048 * 5


def test_refuses() -> None:
    tokenizer = make_tokenizer(chat=True)
    with pytest.raises(DataError, match="the text has only"):
        builtin_text(tokenizer, rows=1000, length=2048, seed=0)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(DataError, match="the chat template cannot write a chat of user and assistant: only one turn"):
        builtin_text(tokenizer, rows=2, length=16, seed=0)
