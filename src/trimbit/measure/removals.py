"""The damage of leaving out each sub-block, measured: the second order says too little of so large a change.

One sweep over the blocks carries the dense model's hidden states and those of every model that lacks one sub-block so
far, so that no more than one block is in memory.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimbit.jobs.carried import Carried
from trimbit.jobs.progress import Progress
from trimbit.measure.choices import allowed_widths
from trimbit.model.forward.compute import computing
from trimbit.model.forward.halves import only_half
from trimbit.model.forward.logits import LOGIT_TOKENS, kl, logit_slices
from trimbit.model.forward.stream import CHUNK_TOKENS, BlockStream
from trimbit.model.layout import Layout, Unit
from trimbit.schema.measurements import Measurements
from trimbit.schema.space import Space

DENSE = "dense"
States = Float[Tensor, "rows length hidden"]
ROWS, LENGTH = 4, 128  # ours: what a sub-block is worth differs more between texts than along one


def removable(layout: Layout, space: Space) -> list[Unit]:
    """The sub-blocks that may go."""
    return [unit for unit in layout.units.values() if 0 in allowed_widths(layout, unit, space)]


def measure_removals(
    stream: BlockStream, tokens: Int[Tensor, "rows length"], space: Space, folder: Path, progress: Progress
) -> dict[str, float]:
    """KL of the dense model without each sub-block that may go, by its dim, in nats a token.

    Only the first `LENGTH` tokens of the first `ROWS` rows are read.

    A sweep that was interrupted goes on from the block that it had reached, kept in `folder`.
    """
    layout, carried, tokens = stream.layout, Carried(folder), tokens[:ROWS, :LENGTH]
    done, hidden = 0, {DENSE: stream.embed(tokens)}
    if (known := carried.load()) is not None:
        done, hidden = known[0], {name: own.to(stream.device) for name, (own,) in known[1].items()}
    units = removable(layout, space)
    for index in range(done, layout.blocks):
        block = stream.load(index)
        lacking: dict[str, Tensor] = {}
        for number, unit in enumerate(units):
            if unit.block == index:
                others = [own for own in layout.units.values() if own.block == index and own is not unit]
                state = hidden[DENSE]
                for other in others:
                    with only_half(block, layout, other):
                        state = stream.run(index, block, state)
                lacking[str(number)] = state
        hidden = _run(stream, index, block, hidden) | lacking
        carried.save(index + 1, {name: [own] for name, own in hidden.items()})
        progress(index + 1, layout.blocks)
    damage = _divergences(stream, hidden, tokens.numel())
    carried.finish()
    return {unit.dim: damage[str(number)] for number, unit in enumerate(units) if unit.dim is not None}


def _run(stream: BlockStream, index: int, block: nn.Module, hidden: Mapping[str, States]) -> dict[str, States]:
    """The outputs of a block for the states of all models, several at a time."""
    count = len(hidden[DENSE])
    chunks = torch.cat(list(hidden.values())).split(max(1, CHUNK_TOKENS // LENGTH))
    found = torch.cat([stream.run(index, block, x) for x in chunks])
    return dict(zip(hidden, found.split(count), strict=True))


def _divergences(stream: BlockStream, hidden: Mapping[str, States], tokens: int) -> dict[str, float]:
    """KL of each model to the dense one, logits of some tokens and one model at a time."""
    head, config = stream.head(), stream.layout.config
    total = dict.fromkeys((name for name in hidden if name != DENSE), 0.0)

    def log_softmax(x: Tensor) -> Tensor:
        ((_, logits),) = logit_slices(head, config, x)
        return torch.log_softmax(logits, -1)

    normed = {name: stream.final_norm(state).flatten(0, -2) for name, state in hidden.items()}
    with computing(stream.compute, stream.device.type):
        for part in torch.arange(tokens).split(LOGIT_TOKENS):
            log_p = log_softmax(normed[DENSE][part])
            for name in total:
                total[name] += kl(log_p, log_softmax(normed[name][part]))
    return {name: own / tokens for name, own in total.items()}


def with_measured(found: Measurements, removals: dict[str, float]) -> Measurements:
    """Predicted damage with that of whole sub-blocks as measured."""
    widths = (
        one.model_copy(update={"damage": removals[one.dim], "by": "measured"}) if one.width == 0 else one
        for one in found.widths
    )
    return found.model_copy(update={"widths": tuple(widths)})
