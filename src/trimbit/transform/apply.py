"""Apply a plan: cut, refit and quantise block by block, each on the inputs that the compressed blocks before it give.

Each block is passed in the order of its sites, so that H of a site already carries the error of everything before it. A
refit aims at what the uncut sub-block makes of these same inputs: aimed at the dense model's, it shrinks what it keeps,
because the compressed inputs are noisy (docs/benchmarks.md has the figures). Held-out rows, untouched by any fit, go
along in the dense model too, and say at the end what the plan really costs.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.artifact.writer import Writer
from trimbit.calibrate.stats import Stats
from trimbit.errors import PlanError
from trimbit.jobs.progress import Progress
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.plan import Plan
from trimbit.transform.block import _Job
from trimbit.transform.repair import refit
from trimbit.transform.weight import Method, identity_moments, tied_moments


def apply_plan(
    stream: BlockStream, plan: Plan, tokens: Int[Tensor, "rows length"], method: Method, repair: refit.Config | None,
    stats: Stats | None, writer: Writer, progress: Progress, held_out: Int[Tensor, "held held_length"] | None = None,
) -> list[float]:  # fmt: skip
    """Write all tensors of a plan through `writer`; memory holds one block, twice, and the hidden states.

    `stats` give H of a tied head, whose table is quantised first because the blocks read it too; a quantiser that
    needs no moments needs no `stats`.

    Returns:
        KL(original || compressed) on each of the `held_out` rows, in nats a token.

    Raises:
        PlanError: if the plan does not fit the model, or is in another basis than `stream`.
        NumericsError: if H of a site cannot be factored, naming the weight.
    """
    layout = stream.layout
    layout.check(plan)
    if plan.rotation != stream.rotation:
        raise PlanError(f"the plan's rotation is {plan.rotation}, but the model is run with {stream.rotation}")
    family = layout.family
    needs = method.needs_moments
    table = stream.checkpoint.tensor(f"{family.embed}.weight").float()
    lookup = identity_moments(table.shape[1])
    if layout.tied and needs:
        assert stats is not None, "a tied head needs statistics"
        lookup = tied_moments(stats.moments("head_in"))
    (packed,) = method.compress([table], lookup, [family.embed], [plan.weights[family.embed]], [0])
    writer.add(packed.tensors(family.embed))
    job = _Job(stream, plan, tokens, method, repair or refit.Config(), packed, held_out)
    del table
    for index in range(layout.blocks):
        writer.add(job.block(index))
        progress(index + 1, layout.blocks)
    if not layout.tied:
        head = stream.checkpoint.tensor(f"{family.head}.weight").float()
        moments = job.final_moments() if needs else None
        (packed,) = method.compress([head], moments, [family.head], [plan.weights[family.head]], [0])
        writer.add(packed.tensors(family.head))
    writer.add({name: stream.checkpoint.tensor(name).to(torch.bfloat16) for name in layout.fixed})
    if held_out is None:
        return []
    head_name = family.embed if layout.tied else family.head
    original = stream.checkpoint.tensor(f"{head_name}.weight").to(stream.compute)
    return job.damage(original, packed.dense(torch.bfloat16).to(stream.compute), held_out)
