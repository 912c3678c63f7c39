"""Dequantisation against a loop over single elements in plain Python."""

import numpy as np
import pytest
import torch

from plans import FORMATS, runs
from trimbit.kernels.weights import dequantize
from trimbit.schema.precision import NF4_LEVELS, code_row_nbytes, group_count, zero_row_nbytes

MIXED = [
    runs((70, "int4g32"), (33, "uint3g32"), (7, "bf16"), (65, "uint5g64"), (9, "int2row"), (3, "uint7row")),
    runs((5, "bf16"), (1, "int3g128"), (129, "uint2g128"), (130, "int8g64")),
    runs((66, "ternaryg32"), (9, "mbinaryg32"), (33, "uint3g32"), (70, "binaryrow"), (3, "mbinaryrow"), (2, "bf16")),
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
        bits = {"n": 4, "t": None, "b": 1, "m": 1}.get(p.name[0]) if "int" not in p.name else p.bits
        size = (n + 4) // 5 if bits is None else (n * bits + 7) // 8
        own = bytes(codes[at_code : at_code + size])
        zsize = {"u": (groups * (bits or 0) + 7) // 8, "m": 2 * groups}.get(p.name[0], 0)
        own_zeros = bytes(zeros[at_zero : at_zero + zsize])
        for i in range(n):
            group = 0 if p.group is None else i // p.group
            scale = scales[at_scale + group]
            if p.name.startswith("ternary"):
                out.append((own[i // 5] // 3 ** (i % 5) % 3 - 1) * scale)
                continue
            code = int.from_bytes(own, "little") >> (i * bits) & (2**bits - 1)
            if p.name.startswith("nf4"):
                out.append(float(np.float32(NF4_LEVELS[code])) * scale)
            elif p.name.startswith("binary"):
                out.append(scale if code else -scale)
            elif p.name.startswith("mbinary"):
                mean = float(np.frombuffer(own_zeros, "<f2")[group])
                out.append(mean + scale if code else mean - scale)
            elif p.symmetric:
                out.append((code - 2 ** (bits - 1)) * scale)
            else:
                out.append((code - (int.from_bytes(own_zeros, "little") >> (group * bits) & (2**bits - 1))) * scale)
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
    at = 0
    for run in formats:  # nor in fp16
        nbytes = run.precision.zero_nbytes(run.count)
        if run.precision.name.startswith("mbinary"):
            means = torch.randn(rows, nbytes // 2, generator=generator).to(torch.float16)
            zeros[:, at : at + nbytes] = means.view(torch.uint8)
        at += nbytes
    want = torch.tensor(
        [naive(c, s, z, formats) for c, s, z in zip(codes.tolist(), scales.tolist(), zeros.tolist(), strict=True)]
    )
    stored = zeros if zeros.shape[1] else None
    assert torch.equal(dequantize(codes, scales, stored, formats, torch.float32), want)
    lone = [
        dequantize(
            codes[r, None], scales[r, None], stored if stored is None else stored[r, None], formats, torch.float32
        )
        for r in range(rows)
    ]  # what follows an odd byte is not aligned
    assert torch.equal(torch.cat(lone), want)
    low = dequantize(codes, scales, stored, formats, torch.bfloat16)
    assert low.dtype is torch.bfloat16
    assert torch.equal(low, want.bfloat16())  # rounded once, not factor by factor
