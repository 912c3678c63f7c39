"""The importance of each layer to the task: mutual information of what it adds to the stream and the prediction.

Two sweeps over the tokens, block by block: the first finds what the model predicts, the second what each sub-block and
each block adds. The model may be cut; `load` gives its blocks.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trimbit.jobs.progress import Progress
from trimbit.measure.criteria.mutual_information import Config, information
from trimbit.model.forward.compute import computing
from trimbit.model.forward.halves import only_half
from trimbit.model.forward.logits import logit_slices
from trimbit.model.forward.stream import BlockStream, embed_chunks

Load = Callable[[int], nn.Module]


def layer_information(
    stream: BlockStream, load: Load, tokens: Int[Tensor, "rows length"], config: Config, progress: Progress
) -> dict[str, float]:
    """I(increment; predicted token) in nats, of `blocks.7.attn`, `blocks.7.mlp` and `blocks.7` for every block.

    The first token of each row is left out: what it adds is of another size, and would take the first components.
    """
    layout = stream.layout
    predicted = _predictions(stream, load, tokens, progress)
    hidden = embed_chunks(stream, tokens)
    found: dict[str, float] = {}
    for index in range(layout.blocks):
        block, start = load(index), hidden
        for kind in ("attn", "mlp"):
            unit = layout.units[f"blocks.{index}.{kind}"]
            before = hidden
            with only_half(block, layout, unit):
                hidden = [stream.run(index, block, chunk) for chunk in before]
            found[unit.name] = information(_added(before, hidden), predicted, config)
        found[f"blocks.{index}"] = information(_added(start, hidden), predicted, config)
        progress(layout.blocks + index + 1, 2 * layout.blocks)
    return found


def _added(before: list[Tensor], after: list[Tensor]) -> Tensor:
    return torch.cat([(new - old)[:, 1:].flatten(0, 1) for old, new in zip(before, after, strict=True)]).cpu()


def _predictions(
    stream: BlockStream, load: Load, tokens: Tensor, progress: Progress
) -> Int[Tensor, " samples"]:  # fmt: skip
    """The most likely next token at each position but the first of a row."""
    layout = stream.layout
    hidden = embed_chunks(stream, tokens)
    for index in range(layout.blocks):
        block = load(index)
        hidden = [stream.run(index, block, chunk) for chunk in hidden]
        progress(index + 1, 2 * layout.blocks)
    head, found = stream.head(), []
    for chunk in hidden:
        with computing(stream.compute, stream.device.type):
            final = stream.final_norm(chunk)[:, 1:].flatten(0, 1)
            found += [logits.argmax(-1) for _, logits in logit_slices(head, layout.config, final)]
    return torch.cat(found).cpu()
