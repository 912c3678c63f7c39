"""Widths from one pruning ratio for every block, as in block-wise LLM-Pruner; fixed before any search."""

from trimbit.errors import RecipeError
from trimbit.model.layout import Layout, Unit
from trimbit.schema.space import PruneRatio

PAPER = "LLM-Pruner, arXiv:2305.11627"


def protected(layout: Layout, prune: PruneRatio) -> tuple[int, ...]:
    """The first and last blocks, which are not pruned: a share of all blocks."""
    first, last = (round(share * layout.blocks) for share in (prune.first, prune.last))
    return (*range(first), *range(layout.blocks - last, layout.blocks))


def kept_widths(layout: Layout, prune: PruneRatio) -> dict[str, int]:
    """The kept width of each dim in the pruned blocks, such that `ratio` of all blocks' parameters are cut.

    The nearest number of KV groups is cut, but never the last one; feed-forward channels make up the difference.

    Raises:
        RecipeError: if nothing of a sub-block would be left, naming the largest ratio that leaves something, or if
            nothing would be cut.
    """
    spared = protected(layout, prune)
    blocks = [index for index in range(layout.blocks) if index not in spared]
    if not blocks:
        raise RecipeError(f"prune.first and prune.last leave none of the {layout.blocks} blocks to prune")
    share = prune.ratio * layout.blocks / len(blocks)  # cut from each pruned block
    widths: dict[str, int] = {}
    for index in blocks:
        attn, mlp = layout.units[f"blocks.{index}.attn"], layout.units[f"blocks.{index}.mlp"]
        per_group, per_channel = _per_member(layout, attn), _per_member(layout, mlp)
        total = per_group * attn.size + per_channel * mlp.size
        groups = max(1, attn.size - round(share * attn.size))
        channels = mlp.size - (share * total - per_group * (attn.size - groups)) / per_channel
        step = min(prune.channel_multiple, mlp.size)
        kept = min(mlp.size, round(channels / step) * step)
        if kept < 1:
            left = 1 - (per_group + step * per_channel) / total
            raise RecipeError(
                f"prune.ratio {prune.ratio:g} leaves no feed-forward channels of block {index}; "
                f"a ratio up to about {left * len(blocks) / layout.blocks:.2f} leaves a KV group and {step} channels"
            )
        widths |= {
            dim: width for unit, width in ((attn, groups), (mlp, kept)) if width != unit.size and (dim := unit.dim)
        }
    if not widths:
        raise RecipeError(
            f"prune.ratio {prune.ratio:g} is too small to cut {prune.channel_multiple} channels of any block"
        )
    return widths


def _per_member(layout: Layout, unit: Unit) -> int:
    """Parameters of a unit's weights per member of its dim."""
    full, less = (
        sum(rows * cols for rows, cols in (layout.weight_shape(layout.weights[name], width) for name in unit.weights))
        for width in (unit.size, unit.size - 1)
    )
    return full - less
