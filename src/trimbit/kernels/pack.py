"""Dense packing of the codes of a row, least significant first, padded only at its end.

As bits: eight codes fill `bits` whole bytes, so n codes take ceil(n * bits / 8) bytes. As digits: a byte holds
`per_byte` whole codes below `base`, such as five trits, so n codes take ceil(n / per_byte) bytes.
"""

import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows nbytes"]:
    """Pack codes below 2^bits; the bits after a row's last code are zero."""
    rows, n = codes.shape
    padded = torch.zeros(rows, -(-n // 8) * 8, dtype=torch.int64, device=codes.device)
    padded[:, :n] = codes
    eights = padded.view(rows, -1, 8)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (eights << shifts).sum(-1)  # 8 codes of at most 8 bits: 64 bits
    octets = (words.unsqueeze(-1) >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return octets.to(torch.uint8).view(rows, -1)[:, : -(-n * bits // 8)].contiguous()


def unpack(packed: UInt8[Tensor, "rows nbytes"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The inverse of `pack`, for n codes a row."""
    rows, nbytes = packed.shape
    if bits == 8:
        return packed[:, :n]
    if 8 % bits == 0:
        return spread(packed, digits(2**bits, 8 // bits, packed.device).to(torch.uint8))[:, :n]
    if missing := -nbytes % bits:
        packed = torch.nn.functional.pad(packed, (0, missing))
    octets = packed.reshape(rows, -1, bits)
    codes = torch.empty(rows, octets.shape[1], 8, dtype=torch.uint8, device=packed.device)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        value = octets[..., byte] >> shift
        if shift + bits > 8:
            value = value | (octets[..., byte + 1] << (8 - shift))
        codes[..., slot] = value & (2**bits - 1)
    return codes.view(rows, -1)[:, :n]


def pack_digits(codes: UInt8[Tensor, "rows n"], base: int, per_byte: int) -> UInt8[Tensor, "rows nbytes"]:
    """Pack codes below `base`, base^per_byte <= 256; the digits after a row's last code are zero."""
    rows, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n % per_byte)).view(rows, -(-n // per_byte), per_byte)
    worth = (base ** torch.arange(per_byte, device=codes.device)).to(torch.uint8)
    return (padded * worth).sum(-1, dtype=torch.uint8)


def digits(base: int, per_byte: int, device: torch.device) -> Int64[Tensor, "256 per_byte"]:
    """The digits of each byte; bytes that `pack_digits` never gives count modulo base^per_byte."""
    worth = base ** torch.arange(per_byte, device=device)
    return torch.arange(256, device=device)[:, None] // worth % base


def spread(packed: UInt8[Tensor, "rows nbytes"], table: Shaped[Tensor, "256 k"]) -> Shaped[Tensor, "rows n"]:
    """The k values of each byte in `table`, looked up together; n = k * nbytes."""
    size = table.shape[1]
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size * table.element_size())
    entries = table if word is None else table.view(word).flatten()  # looking up words is faster than looking up rows
    found = torch.index_select(entries, 0, packed.flatten().int())
    return found.view(table.dtype).view(len(packed), size * packed.shape[1])
