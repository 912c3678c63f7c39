"""Widths by a ratio: the parameters that go, the blocks that are spared, and ratios that leave nothing."""

import pytest
from transformers import AutoConfig

from plans import make_plan
from trimbit.errors import RecipeError
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.schema.space import PruneRatio
from trimbit.search.ratio import kept_widths, protected


def layout(blocks, heads=8, kv=8, mid=704):
    config = AutoConfig.for_model(
        "llama", hidden_size=256, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mid, vocab_size=96,
    )  # fmt: skip
    return build_layout(config)


def test_the_first_and_last_blocks_are_spared_as_in_the_reference_code():
    assert protected(layout(32), PruneRatio(ratio=0.2)) == (0, 1, 2, 3, 30, 31)
    assert protected(layout(30), PruneRatio(ratio=0.2)) == (0, 1, 2, 3, 28, 29)
    assert protected(layout(3), PruneRatio(ratio=0.2, first=0, last=0)) == ()


@pytest.mark.parametrize("kv", [8, 2])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_that_share_of_the_blocks_parameters_goes(ratio, kv):
    """Few KV groups cannot follow the ratio; feed-forward channels make up for that."""
    found = layout(32, kv=kv)
    widths = kept_widths(found, PruneRatio(ratio=ratio, channel_multiple=1))
    plan = make_plan(found, cuts={dim: tuple(range(width)) for dim, width in widths.items()})
    units = [unit for unit in resolve(plan, found).units.values() if unit.origin.block is not None]
    left = sum(rows * cols for unit in units for rows, cols in (weight.shape for weight in unit.weights.values()))
    total = sum(w.rows * w.cols for w in found.weights.values() if found.units[w.unit].block is not None)
    assert 1 - left / total == pytest.approx(ratio, abs=0.001)
    spared = protected(found, PruneRatio(ratio=ratio))
    assert not any(int(dim.split(".")[1]) in spared for dim in widths)
    assert len({width for dim, width in widths.items() if dim.endswith("mid")}) == 1


def test_kept_channels_are_a_multiple():
    widths = kept_widths(layout(32), PruneRatio(ratio=0.3))
    assert {width % 32 for dim, width in widths.items() if dim.endswith("mid")} == {0}


@pytest.mark.parametrize("ratio", [0.82, 0.95])
def test_a_ratio_that_empties_a_block_is_refused(ratio):
    with pytest.raises(RecipeError, match=r"leaves no feed-forward channels of block 4; a ratio up to about 0\.7\d"):
        kept_widths(layout(32), PruneRatio(ratio=ratio))


def test_a_ratio_needs_blocks_to_prune():
    with pytest.raises(RecipeError, match="leave none of the 4 blocks"):
        kept_widths(layout(4), PruneRatio(ratio=0.1, first=0.5, last=0.5))


@pytest.mark.parametrize(("kv", "ratio"), [(1, 0.3), (1, 0.5), (2, 0.5)])
def test_the_last_kv_group_stays(kv, ratio):
    widths = kept_widths(layout(32, kv=kv), PruneRatio(ratio=ratio))
    assert min(widths.get("blocks.9.attn.kv", kv), 1) == 1


def test_a_ratio_that_cuts_nothing_is_refused():
    with pytest.raises(RecipeError, match="too small to cut 32 channels"):
        kept_widths(layout(32), PruneRatio(ratio=0.001))


def test_a_multiple_that_does_not_divide_never_widens():
    assert max(kept_widths(layout(32, mid=1536), PruneRatio(ratio=0.1, channel_multiple=1000)).values()) <= 1536
