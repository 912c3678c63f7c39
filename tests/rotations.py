"""Rotated tiny models, and the rotation as a matrix."""

from statistics import fmean

import torch
from transformers import AutoModelForCausalLM

from tiny import VOCAB
from trimbit.kernels.hadamard import factors, matrix
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.runtime.rotation import turn
from trimbit.schema.plan import Rotation
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import refit
from trimbit.transform.rotate import RotatedStream
from trimbit.transform.weight import WeightCompressor
from written import collected, taught, writing

ROTATION = Rotation(seed=3)


RTN, GPTQ = WeightCompressor(module=rtn, config=rtn.Config()), WeightCompressor(module=gptq, config=gptq.Config())


def sample(rows, seed):
    return torch.randint(3, VOCAB, (rows, 32), generator=torch.Generator().manual_seed(seed))


def rotated(plan, rotation=ROTATION):
    return plan.model_copy(update={"rotation": rotation})


def streams(folder, rotation):
    checkpoint = open_checkpoint(folder)
    layout = build_layout(checkpoint.config)
    if rotation is None:
        return BlockStream(checkpoint, layout, torch.float32)
    return RotatedStream(checkpoint, layout, rotation, torch.float32)


def write(folder, out, plan, method=RTN, **fields):
    stream = streams(folder, fields.get("rotation", plan.rotation))
    stats = collected(stream, sample(70, 0), out.parent / f"{out.name}-stats") if method is GPTQ else None
    with writing(out, stream.layout, plan) as writer:
        kls = apply_plan(
            stream, plan, sample(70, 0), method, refit.Config(), stats, writer, lambda *_: None,
            *taught(streams(folder, None), sample(4, 2), folder),
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), fmean(kls)


def dense_h(n):
    product = torch.ones(1, 1, dtype=torch.float64)
    for order in factors(n):
        product = torch.kron(product, matrix(order, torch.device("cpu")).double())
    return product / n**0.5


def dense_q(n, rotation=ROTATION):
    return turn(torch.eye(n), rotation).double()
