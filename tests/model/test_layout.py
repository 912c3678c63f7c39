"""The one byte count, and the plans that a layout refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from plans import make_plan, random_plan, runs
from tiny import tiny_config
from trimbit.artifact.writer import DTYPES as ARTIFACT_DTYPES
from trimbit.errors import PlanError
from trimbit.model.build import build_layout
from trimbit.model.layout import header_bound
from trimbit.model.shards import METADATA

DTYPES = {name: getattr(torch, kind.removeprefix("torch.")) for kind, name in ARTIFACT_DTYPES.items()}


def layout_of(model_type, *, tied):
    config = tiny_config(model_type)
    config.tie_word_embeddings = tied
    return build_layout(config)


LAYOUTS = {
    "llama": layout_of("llama", tied=False),
    "tied": layout_of("llama", tied=True),
    "qwen2": layout_of("qwen2", tied=True),
}


LLAMA = LAYOUTS["llama"]


O_PROJ = "model.layers.0.self_attn.o_proj"


Q_PROJ = "model.layers.0.self_attn.q_proj"


def write(specs, path):
    save_file(
        {name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for name, spec in specs.items()},
        path,
        metadata=METADATA,
    )
    return path.stat().st_size


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bytes_are_those_of_the_file(layout, tmp_path_factory, seed):
    plan = random_plan(layout, seed)
    layout.check(plan)
    specs = layout.tensors(plan)
    size = write(specs, tmp_path_factory.getbasetemp() / "one.safetensors")
    assert layout.file_nbytes(plan) == size
    nbytes = sum(DTYPES[spec.dtype].itemsize * torch.Size(spec.shape).numel() for spec in specs.values())
    assert plan.nbytes(layout) == nbytes
    plain = plan.model_copy(update={"orders": {}})
    assert layout.file_nbytes(plain) - plain.nbytes(layout) <= header_bound(layout)


def test_a_tied_table_and_biases_count_once():
    tied, untied = (LAYOUTS[name].tensor_nbytes(make_plan(LAYOUTS[name])) for name in ("tied", "llama"))
    assert untied - tied == 96 * 48 * 2
    biased = make_plan(LLAMA, biases=(O_PROJ,))
    assert LLAMA.tensor_nbytes(biased) - untied == 48 * 2
    qwen = LAYOUTS["qwen2"]
    assert qwen.tensor_nbytes(make_plan(qwen)) - tied == 3 * (48 + 24 + 24) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": {"blocks.9.mlp.mid": ()}}, "no dim 'blocks.9.mlp.mid'"),
        ({"cuts": {"blocks.0.mlp.kv": ()}}, "no dim 'blocks.0.mlp.kv'"),
        ({"cuts": {"embed": ()}}, "no dim 'embed'"),
        ({"cuts": {"blocks.0.attn.kv": (0, 1, 1)}}, "distinct and below 3"),
        ({"cuts": {"blocks.0.attn.kv": (0, 1, 3)}}, "distinct and below 3"),
        ({"cuts": {"blocks.0.attn.kv": (0, 1, -1)}}, "distinct and below 3"),
        ({"cuts": {"blocks.0.attn.kv": ()}}, r"k_proj .*does not exist.*dropped"),
        ({"weights": {Q_PROJ: None}}, "q_proj has no runs"),
        ({"weights": {"model.other": runs((1, "bf16"))}}, r"model\.other does not exist"),
        ({"weights": {Q_PROJ: runs((47, "bf16"))}}, "q_proj: runs cover 47 input channels, but 48 are kept"),
        ({"cuts": {"blocks.0.attn.kv": (0, 2)}}, "o_proj: runs cover 48 input channels, but 32 are kept"),
        ({"biases": (Q_PROJ,)}, "q_proj cannot gain a bias"),
        ({"biases": ("lm_head",)}, "lm_head cannot gain a bias"),
        ({"biases": ("nothing",)}, "nothing cannot gain a bias"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    plan = make_plan(LLAMA)
    LLAMA.check(plan)
    if "weights" in change:
        weights = {**plan.weights, **change["weights"]}
        change = {"weights": {name: value for name, value in weights.items() if value is not None}}
    with pytest.raises(PlanError, match=message):
        LLAMA.check(plan.model_copy(update=change))
