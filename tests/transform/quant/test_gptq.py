"""GPTQ: against RTN where the two must agree, and against OBQ column by column."""

import re

import pytest
import torch

from plans import runs
from points import points
from trimbit.calibrate.inverse import damped
from trimbit.calibrate.moments import Moments
from trimbit.errors import NumericsError
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.quant.grid import fit_grid

SAME_GRID = gptq.Config(scales="absmax", weighted_scales=False)
FORMATS = [
    runs((80, "int3g32")),
    runs((80, "uint2g64")),
    runs((40, "int4row"), (8, "bf16"), (32, "uint3g32")),
    runs((80, "ternaryg64")),
    runs((80, "binaryg32")),
    runs((33, "mbinaryg32"), (7, "int4row"), (4, "bf16"), (36, "ternaryrow")),
]


def moments(h):
    return Moments(count=1000, h=h.float(), mean=torch.zeros(h.shape[0]))


def correlated(n, generator, tokens=2000):
    """Neighbours correlate, and channels differ in size."""
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ torch.linalg.matrix_power(
        torch.eye(n, dtype=torch.float64) + 0.4 * torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5,
        2,
    )
    x *= torch.exp(torch.randn(n, generator=generator))
    return x.T @ x / tokens


def output_error(dw, h):
    return float(torch.einsum("ri,ij,rj->", dw.double(), h, dw.double()))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("scales", ["absmax", "mse"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_a_diagonal_h_gives_rtn(formats, scales, act_order, dead, generator):
    w = torch.randn(6, 80, generator=generator)
    h = torch.diag(torch.rand(80, generator=generator) + 0.1) * (not dead)
    config = gptq.Config(scales=scales, weighted_scales=False, act_order=act_order, block=32)
    q, r = gptq.quantize(w, moments(h), formats, config), rtn.quantize(w, None, formats, rtn.Config(scales=scales))
    assert q.tensors().keys() == r.tensors().keys()
    assert all(torch.equal(tensor, r.tensors()[name]) for name, tensor in q.tensors().items())


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_a_correlated_h_trades_weight_error_for_output_error(formats, act_order, generator):
    w, h = torch.randn(6, 80, generator=generator), correlated(80, generator)
    q = gptq.quantize(w, moments(h), formats, SAME_GRID.model_copy(update={"act_order": act_order})).dequantize()
    r = rtn.quantize(w, None, formats, rtn.Config()).dequantize()
    assert output_error(q - w, h) < 0.8 * output_error(r - w, h)
    assert (q - w).square().sum() > (r - w).square().sum()


@pytest.mark.parametrize("name", ["int3g32", "int4row", "ternaryg32"])
@pytest.mark.parametrize("act_order", [False, True])
def test_what_is_left_of_the_errors_foretells_the_output_s(name, act_order, generator):
    w, h, formats = (
        torch.randn(300, 80, generator=generator),
        correlated(80, generator),
        runs((72, name), (8, "int8row")),
    )
    config = gptq.Config(act_order=act_order, weighted_scales=False)
    q, r = gptq.quantize(w, moments(h), formats, config), rtn.quantize(w, None, formats, rtn.Config(scales="mse"))
    left = gptq.residuals(h, (72, 8), config).double()
    reckoned = damped(h, config.damping)
    squares = ((left @ reckoned) * left).sum(1)
    assert bool((squares <= reckoned.diagonal()).all())
    expected = float(((w - r.dequantize()).double().square().sum(0) * squares).sum())
    assert output_error(w - q.dequantize(), h) == pytest.approx(expected, rel=0.3)
    assert output_error(w - r.dequantize(), h) > 1.7 * expected
    for nothing in (torch.diag(h.diagonal()), torch.zeros(80, 80)):
        torch.testing.assert_close(gptq.residuals(nothing, (72, 8), config), torch.eye(80))


@pytest.mark.parametrize("act_order", [False, True])
def test_residuals_are_what_later_columns_do_not_predict(act_order, generator):
    h, counts = correlated(12, generator), (8, 4)
    left = gptq.residuals(h, counts, gptq.Config(act_order=act_order, damping=0.0))
    by_size = lambda part: sorted(part, key=lambda j: -float(h[j, j])) if act_order else list(part)  # noqa: E731
    order = [*by_size(range(8)), *by_size(range(8, 12))]
    for at, j in enumerate(order):
        later = order[at + 1 :]
        want = torch.zeros(12, dtype=torch.float64)
        want[j] = 1
        if later:
            want[later] = -torch.linalg.solve(h[later][:, later], h[later, j])
        torch.testing.assert_close(left[j].double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_block_size_changes_nothing(formats, act_order, generator):
    w, h = torch.randn(6, 80, generator=generator), correlated(80, generator)
    all_codes = [
        gptq.quantize(w, moments(h), formats, gptq.Config(act_order=act_order, block=block)).codes
        for block in (1, 7, 16, 80, 128)
    ]
    assert all(torch.equal(codes, all_codes[0]) for codes in all_codes)


def obq(w, h, order, candidates):
    """Optimal brain quantisation: round a column, make up for it with all that are left, take it out of H^-1.

    Candidates are the points of each column, [points, rows]; None rounds to bf16.
    """
    w, q = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    left = list(order)
    while left:
        j = left.pop(0)
        if candidates[j] is None:
            q[:, j] = w[:, j].to(torch.bfloat16).double()
        else:
            best = (candidates[j] - w[:, j]).abs().argmin(0)
            q[:, j] = candidates[j].gather(0, best[None])[0]
        error = (w[:, j] - q[:, j]) / inverse[j, j]
        w[:, left] -= error[:, None] * inverse[j, left]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return q


@pytest.mark.parametrize(
    "formats",
    [
        runs((16, "int3row")),
        runs((4, "uint2row"), (5, "int2row"), (2, "bf16"), (5, "int4row")),
        runs((4, "mbinaryrow"), (5, "ternaryrow"), (2, "bf16"), (3, "binaryrow"), (2, "nf4row")),
    ],
)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_obq(formats, act_order, seed):
    generator = torch.Generator().manual_seed(seed)
    w, h = torch.randn(16, 16, generator=generator), correlated(16, generator).float().double()
    w[:8, 4:9] = 0  # in the second case and the third whole groups, so that their scale is zero
    config = SAME_GRID.model_copy(update={"act_order": act_order, "block": 4})
    order, candidates, at, grid = [], [], 0, fit_grid(w, formats, "absmax")
    for run, scale, zero in zip(formats, grid.scales, grid.zeros, strict=True):
        columns = range(at, at + run.count)
        candidates += [None] * run.count if scale is None else points(run, scale.double(), zero.double()).unbind(2)
        order += sorted(columns, key=lambda j: -float(h[j, j])) if act_order else columns
        at += run.count
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    want = obq(w, damped, order, candidates)
    got = gptq.quantize(w, moments(h), formats, config).dequantize()
    bf16 = torch.tensor([each is None for each in candidates])
    torch.testing.assert_close(got[:, ~bf16], want[:, ~bf16].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, bf16], want[:, bf16].float(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("formats", FORMATS)
def test_large_weights_are_swept_in_chunks(formats, monkeypatch, generator):
    """A chunk may end inside a weight and hold rows of two."""
    ws, h = [torch.randn(rows, 80, generator=generator) for rows in (25, 10)], correlated(80, generator)
    alone = [gptq.quantize(w, moments(h), formats, gptq.Config()).tensors() for w in ws]
    monkeypatch.setattr(gptq, "CHUNK", 7 * 80)
    chunks = [q.tensors() for q in gptq.quantize_all(ws, moments(h), [formats, formats], gptq.Config())]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(alone, chunks, strict=True) for name in one)


@pytest.mark.parametrize("act_order", [False, True])
def test_each_run_stays_on_its_own_grid(act_order, generator):
    formats = runs((33, "int3g32"), (6, "bf16"), (40, "uint2g32"), (1, "int8row"))
    w, h = torch.randn(6, 80, generator=generator), correlated(80, generator)
    q = gptq.quantize(w, moments(h), formats, gptq.Config(act_order=act_order))
    dense = q.dequantize()
    at = group = 0
    for run in formats:
        part = dense[:, at : at + run.count]
        at += run.count
        if run.precision.name == "bf16":
            assert torch.equal(part, part.to(torch.bfloat16).float())
            assert not torch.equal(
                part, w[:, at - run.count : at].to(torch.bfloat16).float()
            )  # it made up for the run before
            continue
        for piece in part.split(run.precision.group or run.count, 1):
            steps = piece / q.scales[:, group : group + 1].float()
            group += 1
            torch.testing.assert_close(steps, steps.round())
            half = 2 ** (run.precision.bits - 1)
            if run.precision.symmetric:
                assert -half <= steps.min()
                assert steps.max() < half
            else:
                assert (steps.amax(1) - steps.amin(1)).max() < 2 * half
    assert group == q.scales.shape[1]


@pytest.mark.parametrize("name", ["ternaryg32", "ternaryrow", "binaryg32", "binaryrow", "mbinaryg32", "mbinaryrow"])
@pytest.mark.parametrize("seed", range(3))
def test_few_levels_beat_rtn_with_the_same_search(name, seed):
    generator = torch.Generator().manual_seed(seed)
    w, h, formats = torch.randn(6, 80, generator=generator), correlated(80, generator), runs((80, name))
    q = gptq.quantize(w, moments(h), formats, gptq.Config(weighted_scales=False)).dequantize()
    r = rtn.quantize(w, None, formats, rtn.Config(scales="mse")).dequantize()
    assert output_error(q - w, h) < 0.8 * output_error(r - w, h)


def test_formats_of_one_site_are_swept_together_and_as_if_alone(generator):
    """Rows of one sweep may have other formats in the same column."""
    ws, h = [torch.randn(5, 80, generator=generator) for _ in range(6)], correlated(80, generator)
    formats = [runs((80, name)) for name in ("ternaryg32", "mbinaryg64", "int4g64", "binaryrow", "nf4g32", "bf16")]
    together = gptq.quantize_all(ws, moments(h), formats, gptq.Config())
    for w, own, q in zip(ws, formats, together, strict=True):
        alone = gptq.quantize(w, moments(h), own, gptq.Config())
        assert all(torch.equal(tensor, q.tensors()[name]) for name, tensor in alone.tensors().items())


@pytest.mark.parametrize("act_order", [False, True])
def test_few_levels_stay_on_their_grid(act_order, generator):
    formats = runs((33, "ternaryg32"), (6, "mbinaryrow"), (41, "binaryg64"))
    w, h = torch.randn(6, 80, generator=generator), correlated(80, generator)
    q = gptq.quantize(w, moments(h), formats, gptq.Config(act_order=act_order))
    dense, scales = q.dequantize(), q.scales.float().repeat_interleave(torch.tensor([32, 1, 6, 41]), 1)
    assert set((dense / scales)[:, :33].flatten().tolist()) == {-1.0, 0.0, 1.0}
    assert set((dense / scales)[:, 39:].flatten().tolist()) == {-1.0, 1.0}
    means = q.zeros.view(torch.float16).float()
    assert torch.equal((dense[:, 33:39] - means).abs() > 0, torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close((dense[:, 33:39] - means).abs(), scales[:, 33:39])


def test_damping_that_the_error_suggests_works(generator):
    w, h = torch.randn(6, 80, generator=generator), correlated(80, generator)
    h -= 0.05 * h.diagonal().mean() * torch.eye(80, dtype=torch.float64)
    formats = runs((80, "int4g32"))
    with pytest.raises(NumericsError, match=r"not positive definite with damping 0\.01") as error:
        gptq.quantize(w, moments(h), formats, gptq.Config())
    damping = float(re.search(r"use a damping of (\S+), or", str(error.value))[1])
    assert 0.02 < damping < 0.2
    assert gptq.quantize(w, moments(h), formats, gptq.Config(damping=damping)).dequantize().isfinite().all()


def test_a_singular_h_works_with_the_default_damping(generator):
    w, h = torch.randn(6, 80, generator=generator), correlated(80, generator, tokens=20)
    q = gptq.quantize(w, moments(h), runs((80, "int4g32")), SAME_GRID).dequantize()
    assert output_error(q - w, h) < output_error(
        rtn.quantize(w, None, runs((80, "int4g32")), rtn.Config()).dequantize() - w, h
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_h_that_is_not_finite_is_refused(value):
    h = torch.eye(80)
    h[3, 3] = value
    with pytest.raises(NumericsError, match="not finite"):
        gptq.quantize(torch.ones(2, 80), moments(h), runs((80, "int4g32")), gptq.Config())
