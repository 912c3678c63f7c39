"""Widths by a ratio, the same in every block, as LLM-Pruner cuts block-wise: fixed before any search."""

from trimbit.errors import RecipeError
from trimbit.model.layout import Layout, Unit
from trimbit.schema.space import PruneRatio

PAPER = "LLM-Pruner, arXiv:2305.11627"


def protected(layout: Layout, prune: PruneRatio) -> tuple[int, ...]:
    """The first and last blocks, which are not pruned; their number grows with depth."""
    first, last = (round(share * layout.blocks) for share in (prune.first, prune.last))
    return (*range(first), *range(layout.blocks - last, layout.blocks))


def kept_widths(layout: Layout, prune: PruneRatio) -> dict[str, int]:
    """For each dim of the pruned blocks, how much it keeps, so that `ratio` of all blocks' parameters go.

    KV groups go whole, to the nearest number of them but for the last; feed-forward channels make up for the rest.

    Raises:
        RecipeError: if nothing of a sub-block would be left, naming the largest ratio that leaves something, or if
            nothing would go.
    """
    spared = protected(layout, prune)
    blocks = [index for index in range(layout.blocks) if index not in spared]
    if not blocks:
        raise RecipeError(f"prune.first and prune.last leave none of the {layout.blocks} blocks to prune")
    share = prune.ratio * layout.blocks / len(blocks)  # of a pruned block
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
    """Parameters of a unit's weights that one member of its dim holds."""
    full, less = (
        sum(rows * cols for rows, cols in (layout.weight_shape(layout.weights[name], width) for name in unit.weights))
        for width in (unit.size, unit.size - 1)
    )
    return full - less
