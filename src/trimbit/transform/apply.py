"""Apply a plan: cut, refit and quantise block by block, each on its inputs from the compressed blocks before it.

Each block is passed in the order of its sites, so that H of a site already carries the error of everything before it.
The target of a refit is the uncut sub-block's output on these same inputs: with the dense model's output as target it
would shrink what it keeps, because the compressed inputs are noisy (docs/benchmarks.md has the figures). Held-out rows,
to which nothing is fitted, pass through the compressed blocks, too, and at the end give the plan's real KL.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.artifact.writer import Writer
from trimbit.calibrate.stats import Stats
from trimbit.calibrate.teacher import Teacher
from trimbit.errors import ArtifactError, PlanError
from trimbit.jobs.carried import Carried
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.jobs.progress import Progress
from trimbit.model.forward.stream import BlockStream
from trimbit.model.resolved import Resolved, resolve
from trimbit.schema.plan import Plan
from trimbit.transform.block import _Job
from trimbit.transform.repair import refit
from trimbit.transform.weight import Compressed, WeightCompressor, identity_moments, tied_moments

PARTS = "parts"  # folder of the finished parts


def apply_plan(
    stream: BlockStream, plan: Plan, tokens: Int[Tensor, "rows length"], compressor: WeightCompressor,
    repair: refit.Config | None, stats: Stats | None, writer: Writer, progress: Progress,
    held_out: Int[Tensor, "held held_length"] | None = None, original: Teacher | None = None,
) -> list[float]:  # fmt: skip
    """Write all tensors of a plan through `writer`; memory holds one block, twice, and the hidden states.

    Finished parts are kept in the folder of `writer` until the end, so that an interrupted application goes on.

    `stats` give H of a tied head, whose embedding is quantised first because the blocks read it too; a quantiser that
    needs no moments needs no `stats`. `original` has the original's outputs for the `held_out` rows.

    Returns:
        KL(original || compressed) on each of the `held_out` rows, in nats a token.

    Raises:
        PlanError: if the plan does not fit the model, or is in another basis than `stream`.
        NumericsError: if H of a site cannot be factored, naming the weight.
        ArtifactError: if a file cannot be written or read again.
    """
    layout = stream.layout
    resolved = resolve(plan, layout)
    if plan.rotation != stream.rotation:
        raise PlanError(f"the plan's rotation is {plan.rotation}, but the model is run with {stream.rotation}")
    family = layout.family
    parts = writer.folder / PARTS
    embedding = _embedding(stream, resolved, compressor, stats, parts / "embedding.safetensors")
    blocks = [parts / f"block-{index:04d}.safetensors" for index in range(layout.blocks)]
    carried = Carried(parts)
    job = _Job(stream, resolved, tokens, compressor, repair or refit.Config(), embedding, held_out)
    for index in range(_resume(job, carried, blocks), layout.blocks):
        save_tensors(blocks[index], job.block(index))
        carried.save(index + 1, job.hidden)
        progress(index + 1, layout.blocks)
    writer.add(embedding.tensors(family.embed))
    for path in blocks:
        writer.add(_whole(path))
    head = embedding if layout.tied else _head(job)
    if not layout.tied:
        writer.add(head.tensors(family.head))
    writer.add({name: stream.checkpoint.tensor(name).to(torch.bfloat16) for name in resolved.fixed})
    shutil.rmtree(parts)
    if held_out is None:
        return []
    assert original is not None, "held-out rows are compared with the original"
    own_head = head.dense(torch.bfloat16).to(stream.device, stream.compute)
    return job.damage(original.to(stream.device), own_head, held_out)


def _embedding(
    stream: BlockStream, resolved: Resolved, compressor: WeightCompressor, stats: Stats | None, path: Path
) -> Compressed:
    """The compressed embedding, kept at `path`."""
    layout, name = stream.layout, stream.layout.family.embed
    runs = resolved.weights[name].runs
    if (known := load_tensors(path)) is not None:
        return Compressed.of(known[0], name, runs)
    embedding = stream.checkpoint.tensor(f"{name}.weight").to(stream.device, torch.float32)
    moments = identity_moments(embedding.shape[1])
    if layout.tied and compressor.needs_moments:
        assert stats is not None, "a tied head needs statistics"
        moments = tied_moments(stats.moments("head_in"))
    (made,) = compressor.compress([embedding], moments.to(stream.device), [name], [runs], [0])
    save_tensors(path, made.tensors(name))
    return made


def _head(job: _Job) -> Compressed:
    """The compressed head, if it is not tied."""
    name = job.layout.family.head
    w = job.stream.checkpoint.tensor(f"{name}.weight").to(job.stream.device, torch.float32)
    moments = job.final_moments() if job.compressor.needs_moments else None
    (made,) = job.compressor.compress([w], moments, [name], [job.resolved.weights[name].runs], [0])
    return made


def _resume(job: _Job, carried: Carried, blocks: Sequence[Path]) -> int:
    """Load the state of an interrupted application; returns the number of finished blocks."""
    known = carried.load()
    if known is None or any(load_tensors(path) is None for path in blocks[: known[0]]):
        return 0
    job.hidden = {name: [own.to(job.stream.device) for own in states] for name, states in known[1].items()}
    return known[0]


def _whole(path: Path) -> dict[str, Tensor]:
    """The tensors of a block that was just compressed.

    Raises:
        ArtifactError: if the file was lost or damaged.
    """
    found = load_tensors(path)
    if found is None:
        raise ArtifactError(f"{path} was damaged after it was written; run the same command again")
    return found[0]
