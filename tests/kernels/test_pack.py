"""Dense packing: the bits of a row are one little-endian number; digits fill bytes of their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trimbit.kernels.pack import digits, pack, pack_digits, spread, unpack


@st.composite
def rows_of_codes(draw):
    bits = draw(st.integers(1, 8))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 41)))
    return bits, torch.from_numpy(draw(npst.arrays("uint8", shape, elements=st.integers(0, 2**bits - 1))))


@given(rows_of_codes())
def test_pack_is_one_little_endian_number_and_unpack_its_inverse(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 8))
    for row, want in zip(packed.tolist(), codes.tolist(), strict=True):
        assert int.from_bytes(bytes(row), "little") == sum(code << (i * bits) for i, code in enumerate(want))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_reads_strided_rows_and_ignores_the_padding(bits):
    codes = torch.randint(2**bits, (5, 13), dtype=torch.uint8)
    wide = torch.full((5, 40), 255, dtype=torch.uint8)
    packed = pack(codes, bits)
    wide[:, 3 : 3 + packed.shape[1]] = packed
    if free := packed.shape[1] * 8 - 13 * bits:
        wide[:, 2 + packed.shape[1]] |= 256 - 2 ** (8 - free)
    assert torch.equal(unpack(wide[:, 3 : 3 + packed.shape[1]], bits, 13), codes)


BASES = [(3, 5), (2, 8), (16, 2)]


@pytest.mark.parametrize(("base", "per_byte"), BASES)
@pytest.mark.parametrize("n", range(18))
def test_pack_digits_byte_by_byte_and_back(base, per_byte, n, generator):
    codes = torch.randint(base, (7, n), generator=generator).to(torch.uint8)
    packed = pack_digits(codes, base, per_byte)
    chunks = [[row[at : at + per_byte] for at in range(0, n, per_byte)] for row in codes.tolist()]
    assert packed.tolist() == [[sum(c * base**i for i, c in enumerate(chunk)) for chunk in row] for row in chunks]
    table = digits(base, per_byte, packed.device)
    assert torch.equal(spread(packed, table)[:, :n], codes.long())


@pytest.mark.parametrize("bits", [1, 4])
def test_digits_that_are_bits_are_packed_alike(bits, generator):
    codes = torch.randint(2**bits, (5, 13), generator=generator).to(torch.uint8)
    assert torch.equal(pack_digits(codes, 2**bits, 8 // bits), pack(codes, bits))


@given(npst.arrays("uint8", st.tuples(st.integers(1, 4), st.integers(1, 41)), elements=st.integers(0, 2)))
def test_trits_come_back(trits):
    codes = torch.from_numpy(trits)
    packed = pack_digits(codes, 3, 5)
    assert packed.max() < 243
    assert packed.shape == (len(codes), (codes.shape[1] + 4) // 5)
    for row, want in zip(packed.tolist(), codes.tolist(), strict=True):
        assert [byte // 3**i % 3 for byte in row for i in range(5)][: len(want)] == want


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_spread_looks_up_entries_of_any_size(dtype, k, generator):
    table = torch.randint(256, (256, k), generator=generator).to(dtype)
    packed = torch.randint(256, (3, 40), generator=generator).to(torch.uint8)[:, 5:12]
    want = torch.stack([torch.cat([table[byte] for byte in row]) for row in packed.tolist()])
    assert torch.equal(spread(packed, table), want)
    assert spread(packed[:0], table).shape == (0, 7 * k)
