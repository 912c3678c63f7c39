"""Journals: what was appended is read, what was damaged or cut off is left out and named."""

import logging

from trimbit.jobs.journal import Journal

ENTRIES = [{"change": "a=int4", "kl": 0.25}, {"change": "b", "kl": -1e-9}, {"text": "two\nlines"}]


def written(path):
    journal = Journal(path)
    for entry in ENTRIES:
        journal.append(entry)
    return journal


def test_entries_come_back_in_their_order(tmp_path):
    journal = written(tmp_path / "below" / "j.jsonl")
    assert journal.read() == ENTRIES
    assert Journal(tmp_path / "none").read() == []


def test_a_line_that_was_cut_off_is_left_out_and_writing_goes_on(tmp_path, caplog):
    journal = written(tmp_path / "j.jsonl")
    for cut in range(1, 12):
        journal.path.write_bytes(journal.path.read_bytes()[:-cut])
        with caplog.at_level(logging.WARNING):
            kept = journal.read()
        assert kept == ENTRIES[: len(kept)]
        journal.append({"more": cut})
        assert journal.read() == [*kept, {"more": cut}]
        journal.path.unlink()
        written(journal.path)
    assert "line" in caplog.text


def test_a_changed_line_is_left_out(tmp_path):
    journal = written(tmp_path / "j.jsonl")
    journal.path.write_bytes(journal.path.read_bytes().replace(b"0.25", b"0.26"))
    assert journal.read() == ENTRIES[1:]
