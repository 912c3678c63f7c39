"""Compressed directories of tiny models with every kind of cut and format, and what they should compute."""

import torch
from transformers import AutoModelForCausalLM

from plans import make_plan, runs
from tiny import VOCAB, save_tiny
from trimbit.kernels.weights import dequantize
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.model.resolved import resolve
from trimbit.transform.apply import apply_plan
from trimbit.transform.cut import cut_weight
from trimbit.transform.quant import rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import WeightCompressor
from written import taught, writing

CUTS = {
    "blocks.0.attn.kv": (),
    "blocks.0.mlp.mid": tuple(range(75, 10, -2)),
    "blocks.1.attn.kv": (2, 0),
    "blocks.1.mlp.mid": (),
}


BIASES = ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj")


def formats(weight, cols):
    """Every kind of format somewhere."""
    left = cols - 23
    return {
        "embed_tokens": runs((40, "int8row"), (8, "bf16")),
        "lm_head": runs((cols, "uint6g32")),
        "k_proj": runs((cols, "bf16")),
        "up_proj": runs((cols, "int8g32")),
        "o_proj": runs((cols - 9, "ternaryg32"), (9, "mbinaryg32")),
        "v_proj": runs((cols - 1, "binaryrow"), (1, "nf4row")),
        "down_proj": runs((20, "int7row"), (3, "bf16"), (left, "uint5g32")),
    }.get(weight.role, runs((23, "uint8g32"), (left, "int6g32")))


def written_small(model, folder, plan_formats=formats, biases=BIASES, rows=(70, 32), held_out=None, cuts=CUTS):
    """Save a model, and what the plan above makes of it; gives the KL of each held-out row, too."""
    save_tiny(model, folder / "original")
    checkpoint = open_checkpoint(folder / "original")
    layout = build_layout(checkpoint.config)
    plan = make_plan(layout, plan_formats, cuts, biases)
    stream, method = BlockStream(checkpoint, layout, torch.float32), WeightCompressor(module=rtn, config=rtn.Config())
    tokens = torch.randint(VOCAB, rows, generator=torch.Generator().manual_seed(3))  # by default more than one chunk
    with writing(folder / "small", layout, plan) as writer:
        kls = apply_plan(
            stream,
            plan,
            tokens,
            method,
            refit.Config(),
            None,
            writer,
            lambda *_: None,
            *taught(stream, held_out, folder),
        )
    return folder / "small", layout, plan, kls


def masked_original(folder, layout, plan):
    """The original architecture with the stored weights scattered to where they came from, and zeros elsewhere."""
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = packed.state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "original", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(torch.bfloat16))
    for unit in resolve(plan, layout).units.values():
        for name in unit.origin.weights:
            full = model.get_submodule(name).weight.data
            full.zero_()
            if unit.dropped:
                continue
            if f"{name}.weight" in state:
                dense = state[f"{name}.weight"]
            else:
                dense = dequantize(
                    state[f"{name}.codes"],
                    state[f"{name}.scales"],
                    state.get(f"{name}.zeros"),
                    plan.weights[name],
                    torch.float32,
                )
            where = torch.arange(full.numel()).view(full.shape)
            full.view(-1)[cut_weight(where, unit.weights[name]).flatten()] = dense.flatten()
            if name in plan.biases:
                assert state[f"{name}.bias"].abs().max() > 1e-4
                model.get_submodule(name).bias = torch.nn.Parameter(state[f"{name}.bias"])
    return model.eval()
