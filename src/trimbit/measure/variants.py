"""The damage of changes to single blocks, measured in one sweep, whatever the size of the model.

The sweep carries the dense model's hidden states and those of every model that was changed so far, so that no more than
one block is in memory.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimbit.jobs.carried import Carried
from trimbit.jobs.progress import Progress
from trimbit.model.forward.compute import computing
from trimbit.model.forward.logits import LOGIT_TOKENS, kl, log_softmax, logit_slices
from trimbit.model.forward.stream import CHUNK_TOKENS, BlockStream

DENSE = "dense"
ROWS, LENGTH = 4, 128  # ours: what a sub-block is worth differs more between texts than along one
States = Float[Tensor, "rows length hidden"]
Variant = Callable[[nn.Module], AbstractContextManager[None]]  # changes a block while it is entered


def measure_variants(
    stream: BlockStream, tokens: Int[Tensor, "rows length"], variants: Mapping[int, Mapping[str, Variant]],
    folder: Path, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """KL of the dense model with each change alone, by its name, in nats a token.

    Only the first `LENGTH` tokens of the first `ROWS` rows are read.

    A sweep that was interrupted goes on from the block that it had reached, kept in `folder`.

    Args:
        stream: the dense model.
        tokens: rows of text.
        variants: the changes of each block, by the block's index and by name.
        folder: keeps the state of the sweep.
        progress: counts blocks.
    """
    layout, carried, tokens = stream.layout, Carried(folder), tokens[:ROWS, :LENGTH]
    names = [name for index in range(layout.blocks) for name in variants.get(index, {})]
    short = {name: str(number) for number, name in enumerate(names)}
    done, hidden = 0, {DENSE: stream.embed(tokens)}
    if (known := carried.load()) is not None:
        done, hidden = known[0], {name: own.to(stream.device) for name, (own,) in known[1].items()}
    for index in range(done, layout.blocks):
        block, changed = stream.load(index), {}
        for name, change in variants.get(index, {}).items():
            with change(block):
                changed[short[name]] = stream.run(index, block, hidden[DENSE])
        hidden = _run(stream, index, block, hidden) | changed
        carried.save(index + 1, {name: [own] for name, own in hidden.items()})
        progress(index + 1, layout.blocks)
    damage = _divergences(stream, hidden, tokens.numel())
    carried.finish()
    return {name: damage[short[name]] for name in names}


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

    def log_probabilities(x: Tensor) -> Tensor:
        ((_, logits),) = logit_slices(head, config, x)
        return log_softmax(logits)

    normed = {name: stream.final_norm(state).flatten(0, -2) for name, state in hidden.items()}
    with computing(stream.compute, stream.device.type):
        for part in torch.arange(tokens).split(LOGIT_TOKENS):
            log_p = log_probabilities(normed[DENSE][part])
            for name in total:
                total[name] += kl(log_p, log_probabilities(normed[name][part]))
    return {name: own / tokens for name, own in total.items()}
