"""Shards."""

from hypothesis import given, settings
from hypothesis import strategies as st

from layouts import LLAMA, write
from plans import make_plan, random_plan
from trimbit.model.resolved import resolve
from trimbit.model.shards import shard_nbytes, shards


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.integers(1, 60_000))
def test_shards(tmp_path_factory, seed, limit):
    specs = resolve(random_plan(LLAMA, seed), LLAMA).tensors()
    files = shards(specs, limit)
    assert [name for file in files for name in file] == list(specs)
    assert all(len(file) == 1 or sum(spec.nbytes for spec in file.values()) <= limit for file in files)
    path = tmp_path_factory.getbasetemp() / "shard.safetensors"
    assert [shard_nbytes(file) for file in files] == [write(file, path) for file in files]


def test_a_shard_is_filled_to_the_last_byte():
    specs = resolve(make_plan(LLAMA), LLAMA).tensors()
    first, second, *_ = (spec.nbytes for spec in specs.values())
    assert len(shards(specs, first + second)[0]) == 2
    assert len(shards(specs, first + second - 1)[0]) == 1
