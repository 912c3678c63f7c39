"""What a plan makes of a model, the one byte count, and the plans that do not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layouts import DTYPES, LAYOUTS, LLAMA, write
from plans import make_plan, random_plan, runs
from tiny import tiny_model
from trimbit.errors import PlanError
from trimbit.model.build import build_layout
from trimbit.model.layout import header_bound
from trimbit.model.resolved import join, resolve
from trimbit.runtime.inputs import stored_order
from trimbit.schema.activations import ActRun
from trimbit.transform.cut import cut_unit
from trimbit.transform.quant import rtn

O_PROJ = "model.layers.0.self_attn.o_proj"


Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_of_every_weight_it_says_what_is_stored():
    """By hand, for two heads of eight channels that read one KV group."""
    inside = (1, 0, 2, 3, 4, 5, 6, 7)
    a_in, o_in = tuple(range(47, -1, -1)), tuple(8 * head + i for head in range(4) for i in inside)
    cuts = {"blocks.0.attn.kv": (2, 0), "blocks.0.mlp.mid": (5, 70, 7), "blocks.1.mlp.mid": ()}
    acts = (ActRun(count=48, precision=None),)
    plan = make_plan(LLAMA, lambda _, n: runs((n, "int4row")), cuts, (O_PROJ,)).model_copy(
        update={
            "orders": {"blocks.0.attn.a_in": a_in, "blocks.0.attn.o_in": o_in, "blocks.0.mlp.mid": (2, 0, 1)},
            "acts": {"blocks.0.attn.a_in": acts},
            "adapters": {Q_PROJ: 4},
        }
    )
    resolved = resolve(plan, LLAMA)
    attn, mlp, gone = (resolved.units[name] for name in ("blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp"))
    q, k, v, o = attn.weights.values()
    assert [w.shape for w in (q, k, v, o)] == [(32, 48), (16, 48), (16, 48), (48, 32)]
    assert q.rows.tolist() == [*range(32, 48), *range(16)]
    assert k.rows.tolist() == [*range(16, 24), *range(8)]
    assert v.rows.tolist() == [16 + i for i in inside] + [*inside]
    assert o.rows is None
    assert o.cols.tolist() == [8 * head + i for head in (4, 5, 0, 1) for i in inside]
    assert q.cols.tolist() == k.cols.tolist() == list(a_in)
    assert (q.runs, q.rank, q.bias) == (runs((48, "int4row")), 4, False)
    assert (o.rank, o.bias, o.origin.unit, o.origin.site) == (0, True, "blocks.0.attn", "blocks.0.attn.o_in")
    read, between = attn.sites.values()
    assert (read.module, read.at_output, read.acts) == ("model.layers.0.input_layernorm", True, acts)
    assert read.gather.dtype == torch.int16
    assert read.gather.tolist() == list(a_in)
    assert (between.module, between.at_output, between.gather, between.acts) == (O_PROJ, False, None, ())
    gate, up, down = mlp.weights.values()
    assert gate.rows.tolist() == up.rows.tolist() == down.cols.tolist() == [7, 5, 70]
    assert (attn.width, attn.keep, mlp.width, mlp.keep) == (2, (2, 0), 3, (5, 70, 7))
    assert attn.vectors == {"model.layers.0.input_layernorm.weight": 48}
    assert (gone.dropped, gone.width, gone.keep, gone.weights, gone.tensors()) == (True, 0, (), {}, {})
    whole = resolved.units["blocks.2.mlp"]
    assert (whole.dropped, whole.width, whole.keep) == (False, 80, None)
    assert {(w.rows, w.cols) for w in whole.weights.values()} == {(None, None)}
    assert resolved.weights.keys() == plan.weights.keys()
    assert resolved.structure.gathers == ("blocks.0.attn.a_in",)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_tables_and_what_is_fixed(name):
    layout = LAYOUTS[name]
    resolved = resolve(make_plan(layout, lambda w, n: runs((n, "int8row" if w.unit == "embed" else "bf16"))), layout)
    tables = {key: unit for key, unit in resolved.units.items() if unit.origin.block is None}
    assert tables.keys() == ({"embed"} if name == "tied" else {"embed", "head"})
    for key, unit in tables.items():
        (weight,) = unit.weights.values()
        assert (unit.width, unit.keep, unit.sites, weight.shape) == (None, None, {}, (96, 48))
        assert weight.plain is (key == "head")
    assert resolved.fixed == {"model.norm.weight": (48,)}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bytes_are_those_of_the_tensors(kind, seed):
    """Of a model that is cut and rounded for this, weight by weight."""
    model = tiny_model(kind)
    layout = build_layout(model.config)
    plan = random_plan(layout, seed)
    resolved, nbytes = resolve(plan, layout), 0
    for unit in resolved.units.values():
        if unit.origin.block is not None:
            cut_unit(model, layout, unit)
        for name in unit.weights:
            linear = model.get_submodule(name)
            packed = rtn.quantize(linear.weight.detach(), None, plan.weights[name], rtn.Config())
            nbytes += sum(part.nbytes for part in packed.tensors().values())
            biased = name in plan.biases or getattr(linear, "bias", None) is not None
            nbytes += 2 * len(linear.weight) if biased else 0
        nbytes += sum(2 * model.get_parameter(name).numel() for name, _ in unit.origin.kept if not unit.dropped)
    orders = [stored_order(module) for module in model.modules()]
    nbytes += sum(order.nbytes for order in orders if order is not None) + 2 * model.model.norm.weight.numel()
    assert resolved.nbytes == nbytes


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_structure_alone_says_all_but_the_indices(seed):
    resolved = resolve(random_plan(LLAMA, seed), LLAMA)
    joined = join(resolved.structure, LLAMA)
    assert joined.tensors() == resolved.tensors()
    assert [unit.width for unit in joined.units.values()] == [unit.width for unit in resolved.units.values()]
    assert {(w.rows, w.cols) for w in joined.weights.values()} == {(None, None)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bytes_are_those_of_the_file(layout, tmp_path_factory, seed):
    plan = random_plan(layout, seed)
    resolved = resolve(plan, layout)
    specs = resolved.tensors()
    size = write(specs, tmp_path_factory.getbasetemp() / "one.safetensors")
    assert resolved.file_nbytes == size
    nbytes = sum(DTYPES[spec.dtype].itemsize * torch.Size(spec.shape).numel() for spec in specs.values())
    assert resolved.nbytes == nbytes
    plain = resolve(plan.model_copy(update={"orders": {}}), layout)
    assert plain.file_nbytes - plain.nbytes <= header_bound(layout)


def test_a_tied_table_and_biases_count_once():
    tied, untied = (resolve(make_plan(LAYOUTS[name]), LAYOUTS[name]).nbytes for name in ("tied", "llama"))
    assert untied - tied == 96 * 48 * 2
    biased = make_plan(LLAMA, biases=(O_PROJ,))
    assert resolve(biased, LLAMA).nbytes - untied == 48 * 2
    qwen = LAYOUTS["qwen2"]
    assert resolve(make_plan(qwen), qwen).nbytes - tied == 3 * (48 + 24 + 24) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": {"blocks.9.mlp.mid": ()}}, "no dim 'blocks.9.mlp.mid'"),
        ({"cuts": {"blocks.0.mlp.kv": ()}}, "no dim 'blocks.0.mlp.kv'"),
        ({"cuts": {"embed": ()}}, "no dim 'embed'"),
        ({"cuts": {"blocks.0.attn.kv": (0, 1, 1)}}, "distinct and below 3"),
        ({"cuts": {"blocks.0.attn.kv": (0, 1, 3)}}, "distinct and below 3"),
        ({"cuts": {"blocks.0.attn.kv": (0, 1, -1)}}, "distinct and below 3"),
        ({"cuts": {"blocks.0.attn.kv": ()}}, r"k_proj .*is not in this model.*dropped"),
        ({"weights": {Q_PROJ: None}}, "q_proj has no runs"),
        ({"weights": {"model.other": runs((1, "bf16"))}}, r"model\.other is not in this model"),
        ({"weights": {Q_PROJ: runs((47, "bf16"))}}, "q_proj: runs cover 47 input channels, but 48 are kept"),
        ({"cuts": {"blocks.0.attn.kv": (0, 2)}}, "o_proj: runs cover 48 input channels, but 32 are kept"),
        ({"biases": (Q_PROJ,)}, "q_proj cannot gain a bias"),
        ({"biases": ("lm_head",)}, "lm_head cannot gain a bias"),
        ({"biases": ("nothing",)}, "nothing cannot gain a bias"),
        ({"adapters": {"lm_head": 4}}, "lm_head cannot have a low-rank pair"),
        ({"adapters": {Q_PROJ: 49}}, "q_proj: the low-rank pair has rank 49, but the rank must be 1 to 48"),
        ({"adapters": {Q_PROJ: 0}}, "q_proj: the low-rank pair has rank 0, but"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    plan = make_plan(LLAMA)
    resolve(plan, LLAMA)
    if "weights" in change:
        weights = {**plan.weights, **change["weights"]}
        change = {"weights": {name: value for name, value in weights.items() if value is not None}}
    with pytest.raises(PlanError, match=message):
        resolve(plan.model_copy(update=change), LLAMA)
