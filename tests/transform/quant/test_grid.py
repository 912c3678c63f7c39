"""Scales and zero points of each group."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from plans import FORMATS, runs
from points import points
from trimbit.calibrate.moments import Moments
from trimbit.errors import NumericsError
from trimbit.kernels.qtensor import QTensor
from trimbit.schema.precision import NF4_LEVELS
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.quant.grid import fit_grid

GROUPED = [name for name in FORMATS if name != "bf16"]
INTEGERS = [name for name in GROUPED if "int" in name]


def errors(w, formats, search, weighting):
    """Weighted squared error of each row's groups, one run, by rounding to every point of the grid."""
    (run,) = formats
    grid = fit_grid(w, formats, search, weighting)
    nearest = (w - points(run, grid.scales[0], grid.zeros[0])).square().amin(0) * weighting
    return torch.stack([part.sum(1) for part in nearest.split(run.precision.group or run.count, 1)], 1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(GROUPED), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_mse_is_never_worse_than_absmax(name, cols, tails, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, cols, generator=generator) ** (3 if tails else 1)
    weighting = torch.rand(cols, generator=generator) + 0.01 if weighted else torch.ones(cols)
    mse, absmax = (errors(w, runs((cols, name)), search, weighting) for search in ("mse", "absmax"))
    if "nary" in name:  # solved, then rounded: fp16 moves a scale, and a mean, by up to 2^-11 of itself
        moved = 2**-10 * w.abs().amax() * weighting.sum().sqrt()
        assert bool((mse.sqrt() <= absmax.sqrt() + moved).all())
    else:
        assert bool((mse <= absmax * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("name", INTEGERS)
def test_absmax_reaches_the_ends_and_rounds_to_half_a_step(name, generator):
    w = torch.randn(4, 100, generator=generator)
    q = rtn.quantize(w, None, runs((100, name)), rtn.Config())
    _, scale, _, _ = fit_grid(w, q.runs, "absmax").columns(w)
    off = (q.dequantize() - w).abs()
    # a zero point is rounded as well: the range moves by up to half a step
    assert bool((off <= scale * (0.51 if name.startswith("int") else 1.01)).all())
    assert bool((off[w.abs() == w.abs().amax(1, keepdim=True)] < 0.01 * w.abs().amax()).all()) or name.startswith(
        "uint"
    )


def test_nf4_levels_are_normal_quantiles():
    """As QLoRA says: 8 quantiles below zero, 9 above, an exact zero, scaled to one."""
    tail = 0.9677083
    above, below = (norm.ppf(np.linspace(tail, 0.5, n)[:-1]) for n in (9, 8))
    levels = np.sort(np.concatenate([above, [0.0], -below]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=1e-6)


def outcomes(w, cost, levels):
    """The squared error of each of many sets of levels, [sets, levels], for one group."""
    return ((w - levels[..., None]).square().amin(1) * cost).sum(-1)


def one_group(seed, n, *, skewed):
    """Weights, costs over six orders of magnitude, and all values that levels are looked for among."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator, dtype=torch.float64)
    w = w.exp() if skewed else w
    cost = torch.exp(3 * torch.randn(n, generator=generator, dtype=torch.float64))
    return w, cost, torch.linspace(float(w.abs().max()) / 500, float(w.abs().max()), 500, dtype=torch.float64)


def found(name, w, cost):
    """The error of one group on the grid of least squared error."""
    formats = runs((len(w), name))
    return float(errors(w[None].float(), formats, "mse", cost.float()))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["row", "g32"]), st.integers(1, 32), st.booleans(), st.integers(0, 10**6))
def test_two_and_three_levels_are_no_worse_than_any_that_a_brute_search_finds(group, n, skewed, seed):
    """Up to what fp16 rounds off a mean and a scale: no level lies outside the range, and each moves by 2^-11 of it."""
    w, cost, sizes = one_group(seed, n, skewed=skewed)
    slack = float(cost.sum() * (w.abs().max() * 2**-11).square()) + 1e-12
    ternary = torch.stack([-sizes, 0 * sizes, sizes], 1)
    assert found(f"ternary{group}", w, cost) <= float(outcomes(w, cost, ternary).min()) * (1 + 1e-5) + slack
    binary = torch.stack([-sizes, sizes], 1)
    assert found(f"binary{group}", w, cost) <= float(outcomes(w, cost, binary).min()) * (1 + 1e-5) + slack
    of_column = w.sort().values
    means = [
        [float((part * c).sum() / c.sum()) for part, c in ((of_column[:k], costs[:k]), (of_column[k:], costs[k:]))]
        for costs in [cost[w.argsort()]]
        for k in range(1, n)
    ] or [[float(w[0])] * 2]
    pairs = torch.tensor(means, dtype=torch.float64)
    assert found(f"mbinary{group}", w, cost) <= float(outcomes(w, cost, pairs).min()) * (1 + 1e-5) + slack


def test_scales_of_two_and_three_levels_by_hand():
    w = torch.tensor([[1.0, -1.0, 3.0, -3.0, 0.25, 0.0, 0.25, -0.5]])
    binary, ternary = (fit_grid(w, runs((8, f"{name}row")), "mse") for name in ("binary", "ternary"))
    assert binary.scales[0].item() == 9 / 8
    assert ternary.scales[0].item() == 3.0  # it saves 6^2 / 2 = 18; with both ones 8^2 / 4 = 16
    mean = fit_grid(torch.tensor([[12.0, 0.0, 1.0, 10.0, 2.0]]), runs((5, "mbinaryrow")), "mse")  # at 1 and 11
    assert (mean.zeros[0].item(), mean.scales[0].item()) == (6.0, 5.0)


def test_a_mean_is_found_by_enumerating_signs(generator):
    """All ways to give ten weights one of two levels."""
    w, cost = torch.randn(10, generator=generator).double() + 0.7, torch.rand(10, generator=generator).double()
    least = float("inf")
    for mask in range(1, 2**10 - 1):
        high = torch.tensor([mask >> i & 1 for i in range(10)], dtype=torch.bool)
        error = sum(
            float((cost[side] * (w[side] - (cost[side] * w[side]).sum() / cost[side].sum()).square()).sum())
            for side in (high, ~high)
        )
        least = min(least, error)
    assert found("mbinaryrow", w, cost) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("name", ["binaryrow", "mbinaryrow", "ternaryrow"])
def test_a_normal_distribution_loses_what_it_must(name, generator):
    """Two levels at sqrt(2 / pi); three where the threshold is half of what lies beyond it on average."""
    half = brentq(lambda t: norm.pdf(t) / norm.sf(t) - 2 * t, 0.1, 2)
    want = 1 - 2 * norm.pdf(half) ** 2 / norm.sf(half) if name == "ternaryrow" else 1 - 2 / np.pi
    w = torch.randn(4, 50_000, generator=generator)
    q = rtn.quantize(w, None, runs((50_000, name)), rtn.Config(scales="mse")).dequantize()
    assert float((q - w).square().mean()) == pytest.approx(want, rel=0.02)


def test_a_dead_column_at_the_edge_has_no_level_of_its_own():
    """Its share of the costs is below what sums hold."""
    w, cost = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 50.0]]), torch.tensor([1e6, 1e6, 1e6, 1e6, 1e-12])
    grid = fit_grid(w, runs((5, "mbinaryrow")), "mse", cost)
    torch.testing.assert_close([grid.zeros[0].item(), grid.scales[0].item()], [0.0, 1.0])


@pytest.mark.parametrize("name", ["binaryg32", "mbinaryg32", "ternaryg32"])
def test_absmax_of_two_and_three_levels_spans_the_range(name, generator):
    w = torch.randn(3, 40, generator=generator) + 1
    q = rtn.quantize(w, None, runs((40, name)), rtn.Config()).dequantize()
    for part, own in zip(w.split(32, 1), q.split(32, 1), strict=True):
        torch.testing.assert_close(own.amax(1), part.abs().amax(1), rtol=1e-3, atol=1e-3)
        if name.startswith("m"):
            torch.testing.assert_close(own.amin(1), part.amin(1), rtol=1e-3, atol=2e-3)


def test_mse_weighs_columns():
    w = torch.tensor([[1.0, *[0.25] * 31]])
    dear = torch.ones(32)
    dear[0] = 1e3
    even, outlier = (fit_grid(w, runs((32, "int2row")), "mse", c).scales[0].abs() for c in (torch.ones(32), dear))
    assert even < 0.5 < outlier


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_zero_groups_stay_zero(name, search, generator):
    w = torch.randn(4, 128, generator=generator)
    w[1] = 0
    w[2, :64] = 0
    x = torch.randn(300, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    moments = Moments(count=300, h=x.T @ x / 300, mean=x.mean(0))
    for q in (
        rtn.quantize(w, None, runs((128, name)), rtn.Config(scales=search)),
        gptq.quantize(w, moments, runs((128, name)), gptq.Config(scales=search)),
    ):
        dense = q.dequantize()
        assert not dense[1].any()
        assert dense[0].any()
        if "row" not in name:
            assert not dense[2, :64].any()


@pytest.mark.parametrize("value", [1e7, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["int4g32", "uint4row", "ternaryg32", "binaryrow", "mbinaryg32"])
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_a_scale_beyond_fp16_is_refused(value, name, search):
    w = torch.ones(2, 40)
    w[1, 3] = value
    with pytest.raises(NumericsError, match="does not fit fp16"):
        rtn.quantize(w, None, runs((40, name)), rtn.Config(scales=search))


def test_scales_below_fp16_give_zero():
    w = torch.full((2, 40), 1e-9)
    for name in ("int4g32", "uint4g32", "ternaryg32", "mbinaryrow"):
        assert not rtn.quantize(w, None, runs((40, name)), rtn.Config(scales="mse")).dequantize().any()


MIXED = runs((33, "int4g32"), (5, "bf16"), (40, "uint3g32"))


def test_qtensor(generator):
    w = torch.randn(3, 78, generator=generator)
    q = rtn.quantize(w, None, MIXED, rtn.Config())
    assert q.shape == (3, 78)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in q.tensors().items()} == {
        "codes": (torch.uint8, (3, 17 + 10 + 15)),
        "scales": (torch.float16, (3, 4)),
        "zeros": (torch.uint8, (3, 1)),
    }
    assert q.nbytes == 3 * (42 + 8 + 1)


def test_an_unquantised_qtensor_is_one_bf16_weight(generator):
    w = torch.randn(3, 7, generator=generator)
    q = rtn.quantize(w, None, runs((7, "bf16")), rtn.Config())
    assert q.tensors().keys() == {"weight"}
    assert torch.equal(q.tensors()["weight"], w.to(torch.bfloat16))
    assert torch.equal(q.dequantize(torch.bfloat16), w.to(torch.bfloat16))


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_a_qtensor_of_other_sizes_is_refused(part, generator):
    q = rtn.quantize(torch.randn(3, 78, generator=generator), None, MIXED, rtn.Config())
    tensors = {**q.tensors(), part: q.tensors()[part][:, 1:]}
    with pytest.raises(ValueError, match="its runs need"):
        QTensor(**tensors, runs=MIXED)


def test_zero_points_without_a_run_that_has_them_are_refused():
    codes, scales, zeros = (
        torch.zeros(3, 4, dtype=torch.uint8),
        torch.zeros(3, 1).half(),
        torch.zeros(3, 1, dtype=torch.uint8),
    )
    with pytest.raises(ValueError, match="its runs need"):
        QTensor(codes=codes, scales=scales, zeros=zeros, runs=runs((8, "int4row")))
