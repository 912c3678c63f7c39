"""Files that carry their digest: what was damaged is noticed, named and removed."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimbit.jobs.checked import load_json, load_tensors, save_json, save_tensors

TENSORS = {
    "codes": torch.arange(12, dtype=torch.uint8).view(3, 4).T,  # not contiguous
    "h": torch.randn(3, 3),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(7),
}


def test_tensors_come_back_as_they_were(tmp_path):
    path = tmp_path / "below" / "file.safetensors"
    assert load_tensors(path) is None
    save_tensors(path, TENSORS, {"what": "some"})
    found, metadata = load_tensors(path)
    assert metadata == {"what": "some"}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("at", [0.0, 0.3, 0.9, 1.0])
def test_any_changed_byte_is_noticed(tmp_path, at, caplog):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"h": torch.randn(8, 8)}, {"what": "some"})
    data = bytearray(path.read_bytes())
    data[round(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert load_tensors(path) is None
    assert str(path) in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_noticed(tmp_path, left):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"h": torch.randn(8, 8)})
    path.write_bytes(path.read_bytes()[:left])
    assert load_tensors(path) is None
    assert not path.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(value=JSON)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "file.json"
    save_json(path, value)
    assert load_json(path) == value


@pytest.mark.parametrize("harm", [lambda t: t.replace("3", "4"), lambda t: t[:-2], lambda _: "", lambda _: "[1]"])
def test_damaged_json_is_noticed(tmp_path, harm, caplog):
    path = tmp_path / "file.json"
    assert load_json(path) is None
    save_json(path, {"kl": 0.123})
    path.write_text(harm(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert load_json(path) is None
    assert str(path) in caplog.text
    assert not path.exists()
