"""Dequantisation against a loop over single elements in plain Python."""

import numpy as np
import pytest
import torch

from plans import FORMATS, runs
from trimbit.kernels.reference import dequantize
from trimbit.precision import NF4_LEVELS, code_row_nbytes, group_count, zero_row_nbytes

MIXED = [
    runs((70, "int4g32"), (33, "uint3g32"), (7, "bf16"), (65, "uint5g64"), (9, "int2row"), (3, "uint7row")),
    runs((5, "bf16"), (1, "int3g128"), (129, "uint2g128"), (130, "int8g64")),
    *(runs((45, name)) for name in FORMATS),
]


def naive(codes, scales, zeros, formats):
    """One row as a list of floats."""
    out, at_code, at_scale, at_zero = [], 0, 0, 0
    for run in formats:
        p, n = run.precision, run.count
        if p.name == "bf16":
            for i in range(n):
                low, high = codes[at_code + 2 * i : at_code + 2 * i + 2]
                exponent, mantissa = (high & 127) << 1 | low >> 7, low & 127
                out.append((-1) ** (high >> 7) * (1 + mantissa / 128) * 2.0 ** (exponent - 127))
            at_code += 2 * n
            continue
        groups = 1 if p.group is None else (n + p.group - 1) // p.group
        size = (n * p.bits + 7) // 8
        number = int.from_bytes(bytes(codes[at_code : at_code + size]), "little")
        zsize = 0 if not p.name.startswith("uint") else (groups * p.bits + 7) // 8
        zero_number = int.from_bytes(bytes(zeros[at_zero : at_zero + zsize]), "little")
        for i in range(n):
            group = 0 if p.group is None else i // p.group
            code = number >> (i * p.bits) & (2**p.bits - 1)
            if p.name.startswith("nf4"):
                out.append(float(np.float32(NF4_LEVELS[code])) * scales[at_scale + group])
                continue
            offset = 2 ** (p.bits - 1) if p.symmetric else zero_number >> (group * p.bits) & (2**p.bits - 1)
            out.append((code - offset) * scales[at_scale + group])
        at_code, at_scale, at_zero = at_code + size, at_scale + groups, at_zero + zsize
    assert (at_code, at_scale, at_zero) == (len(codes), len(scales), len(zeros))
    return out


@pytest.mark.parametrize("formats", MIXED, ids=lambda rs: "+".join(f"{r.count}{r.precision.name}" for r in rs))
def test_dequantize(formats, generator):
    rows = 3
    codes = torch.randint(256, (rows, code_row_nbytes(formats)), generator=generator).to(torch.uint8)
    at = 0
    for run in formats:  # arbitrary bytes are not always finite in bf16
        if run.precision.name == "bf16":
            values = torch.randn(rows, run.count, generator=generator).to(torch.bfloat16)
            codes[:, at : at + 2 * run.count] = values.view(torch.uint8)
        at += run.precision.code_nbytes(run.count)
    scales = torch.randn(rows, group_count(formats), generator=generator).to(torch.float16)
    zeros = torch.randint(256, (rows, zero_row_nbytes(formats)), generator=generator).to(torch.uint8)
    want = torch.tensor(
        [naive(c, s, z, formats) for c, s, z in zip(codes.tolist(), scales.tolist(), zeros.tolist(), strict=True)]
    )
    stored = zeros if zeros.shape[1] else None
    assert torch.equal(dequantize(codes, scales, stored, formats, torch.float32), want)
    low = dequantize(codes, scales, stored, formats, torch.bfloat16)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=2**-6, atol=0)
