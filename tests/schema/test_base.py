"""Digests of data."""

from trimbit.schema.base import digest


def test_digest_depends_on_content_alone():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"b": [2, 1], "a": 1})
