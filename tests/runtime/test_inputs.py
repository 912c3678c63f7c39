"""Orders and rounded inputs: an order changes nothing, what the file holds is what the plan says, and it runs."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plans import make_plan, runs
from tiny import MODEL_TYPES, VOCAB, save_tiny, tiny_model
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import PlanError
from trimbit.kernels.acts import round_activations
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.model.resolved import resolve
from trimbit.recover import tune
from trimbit.recover.recovery import _taken_out
from trimbit.recover.tune import _attach
from trimbit.runtime.layers import AdaptedLinear, PackedLinear
from trimbit.schema.activations import ActInt, ActRun
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import lowrank, refit
from trimbit.transform.weight import WeightCompressor
from written import collected, writing

CUTS = {"blocks.1.attn.kv": (2, 0), "blocks.2.mlp.mid": tuple(range(0, 80, 2))}
ACTS = (
    ActRun(count=40, precision=ActInt(bits=4, group=32, clip=0.9)),
    ActRun(count=8, precision=ActInt(bits=8, group=None)),
)
RTN, GPTQ = WeightCompressor(module=rtn, config=rtn.Config()), WeightCompressor(module=gptq, config=gptq.Config())


@dataclass
class Shuffled:
    """Deals orders to the sites of a layout, of widths as they are cut; attention's stays in its heads, or not."""

    layout: object
    plan: object
    seed: int = 0

    def orders(self, *, heads):
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for weight in self.layout.weights.values():
            if not self.layout.readers(weight.site):
                continue
            count = sum(run.count for run in self.plan.weights[weight.name])
            order = torch.randperm(count, generator=generator)
            if heads and weight.site.endswith("o_in"):
                inside = torch.rand(count // 16, 1, 8, generator=generator).argsort(-1).expand(-1, 2, -1)
                order = (inside + torch.arange(count // 8).view(-1, 2, 1) * 8).flatten()
            found.setdefault(weight.site, tuple(order.tolist()))
        return found


def sample(rows, seed):
    return torch.randint(3, VOCAB, (rows, 32), generator=torch.Generator().manual_seed(seed))


def write(folder, out, plan, method=RTN):
    checkpoint = open_checkpoint(folder)
    layout = build_layout(checkpoint.config)
    stream = BlockStream(checkpoint, layout, torch.float32)
    stats = collected(stream, sample(70, 0), out.parent / f"{out.name}-stats") if method is GPTQ else None
    with writing(out, layout, plan) as writer:
        apply_plan(stream, plan, sample(70, 0), method, refit.Config(), stats, writer, lambda *_: None)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def logits(model, seed=1):
    with torch.no_grad():
        return model(sample(3, seed), use_cache=False).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("heads", [True, False], ids=["in their heads", "anywhere"])
def test_an_order_changes_nothing(model_type, heads, tmp_path):
    save_tiny(tiny_model(model_type), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plain = make_plan(layout, cuts=CUTS)
    ordered = plain.model_copy(update={"orders": Shuffled(layout, plain).orders(heads=heads)})
    stored = {site for site in ordered.orders if not site.endswith("mid") and not (heads and site.endswith("o_in"))}
    assert set(resolve(ordered, layout).structure.gathers) == stored
    small = write(tmp_path / "original", tmp_path / "ordered", ordered)
    want = logits(write(tmp_path / "original", tmp_path / "plain", plain))
    torch.testing.assert_close(logits(small), want, rtol=0, atol=3e-5)
    assert weight_nbytes(tmp_path / "ordered") == resolve(ordered, layout).file_nbytes
    tensors = load_file(tmp_path / "ordered/model.safetensors")
    for name in (f"{layout.input_of(site)[0]}.order" for site in stored):
        assert tensors[name].dtype == torch.int16
    plain_tensors = load_file(tmp_path / "plain/model.safetensors")
    moved = [name for name in plain_tensors if not torch.equal(plain_tensors[name], tensors[name])]
    assert {name.split(".")[-2] for name in moved} >= {
        name.rsplit(".", 1)[-1] for name in layout.units["blocks.0.mlp"].weights
    }


def test_a_biased_family_moves_its_biases(tmp_path):
    """Qwen2's V has a bias, whose order has to follow the rows; a refitted bias stays."""
    save_tiny(tiny_model("qwen2"), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plain = make_plan(layout, lambda _, n: runs((n, "int8row")), CUTS, ("model.layers.2.mlp.down_proj",))
    ordered = plain.model_copy(update={"orders": Shuffled(layout, plain).orders(heads=True)})
    want = logits(write(tmp_path / "original", tmp_path / "plain", plain))
    found = logits(write(tmp_path / "original", tmp_path / "ordered", ordered))
    torch.testing.assert_close(found, want, rtol=0, atol=2e-2)  # sums go in another order, then biases are rounded


@pytest.mark.parametrize("method", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2"])
def test_rounded_inputs_run_as_the_plan_says(model_type, method, tmp_path):
    """Against the dense model with the stored weights put back in the original order and inputs rounded by hooks."""
    save_tiny(tiny_model(model_type).bfloat16(), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plain = make_plan(
        layout, lambda w, n: runs((40, "int4g32"), (n - 40, "int8row")) if n < 80 else runs((n, "uint5g32"))
    )
    orders = Shuffled(layout, plain).orders(heads=False)
    acts = {site: ACTS for site in orders if not site.endswith("mid")}
    acts["blocks.1.mlp.mid"] = (ActRun(count=80, precision=ActInt(bits=3, group=32)),)
    plan = plain.model_copy(update={"orders": orders, "acts": acts})
    small = write(tmp_path / "original", tmp_path / "small", plan, method)
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    for name, weight in layout.weights.items():
        own = small.get_submodule(name)
        order = torch.tensor(orders[weight.site]) if weight.site in orders else torch.arange(weight.cols)
        dense = own.dense(torch.float32) if hasattr(own, "dense") else small.get_input_embeddings().dense(torch.float32)
        if weight.role in {"gate_proj", "up_proj", "gate_up_proj"}:  # rows, too
            back = torch.tensor(orders[weight.site.replace("m_in", "mid")]).argsort()
            dense = dense[torch.cat([back, back + 80]) if weight.role == "gate_up_proj" else back]
        module = want.get_submodule(name)
        module.weight.data = dense[:, order.argsort()]
        if weight.site in acts:
            module.register_forward_pre_hook(
                lambda _m, x, o=order, a=acts[weight.site]: (round_activations(x[0][..., o], a)[..., o.argsort()],)
            )
    off = (logits(small) - logits(want)).abs().amax(-1)
    # sums in another order may round an input to the next code, which changes a token
    assert float((off > 1e-4).float().mean()) < 0.05
    for module in want.modules():
        module._forward_pre_hooks.clear()
    assert (logits(small) - logits(want)).abs().max() > 0.05


def test_gptq_makes_up_for_what_its_inputs_are(tmp_path):
    """H is that of the inputs in their stored order, and rounded."""
    save_tiny(tiny_model("llama"), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    table = {"embed_tokens", "lm_head"}
    plain = make_plan(layout, lambda w, n: runs((n, "bf16" if w.role in table else "int3g32")))
    orders = Shuffled(layout, plain).orders(heads=False)
    acts = {site: (ActRun(count=len(order), precision=ActInt(bits=6, group=32)),) for site, order in orders.items()}
    plan = plain.model_copy(update={"orders": orders, "acts": acts})
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32))
    found = [
        (logits(write(tmp_path / "original", tmp_path / name, plan, method)) - dense).square().mean()
        for name, method in (("rtn", RTN), ("gptq", GPTQ))
    ]
    assert found[1] < 0.8 * found[0]


def test_pairs_are_trained_on_the_inputs_that_they_are_written_for(tmp_path):
    """PEFT's layer stands around ours: what changes the input has to stand before both."""
    save_tiny(tiny_model("llama"), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plain = make_plan(layout, lambda _, n: runs((n, "int4g32")))
    orders = Shuffled(layout, plain).orders(heads=False)
    acts = {site: (ActRun(count=len(order), precision=ActInt(bits=4, group=32)),) for site, order in orders.items()}
    ranks = {name: 4 for name, weight in layout.weights.items() if layout.readers(weight.site)}
    plan = plain.model_copy(update={"orders": orders, "acts": acts, "adapters": ranks})
    method = WeightCompressor(module=rtn, config=rtn.Config(), pairs=lowrank.Config(init="loftq", rank=4))
    small = write(tmp_path / "original", tmp_path / "small", plan, method)
    before = logits(small)
    pairs = _taken_out(small)
    assert (logits(small) - before).abs().max() > 0.05
    _attach(small, pairs, (PackedLinear, AdaptedLinear), tune.Config(alpha=4))
    torch.testing.assert_close(logits(small), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": {"head_in": (0,)}}, "site head_in cannot have an order"),
        ({"orders": {"blocks.9.mlp.mid": (0,)}}, r"site blocks\.9\.mlp\.mid cannot have an order"),
        ({"acts": {"blocks.0.mlp.other": ACTS}}, r"site blocks\.0\.mlp\.other cannot have"),
        ({"orders": {"blocks.0.mlp.mid": tuple(range(79))}}, "must be a permutation of its 80 kept channels"),
        ({"orders": {"blocks.2.mlp.mid": tuple(range(80))}}, "must be a permutation of its 40 kept channels"),
        ({"orders": {"blocks.0.mlp.mid": (0, *range(79))}}, "must be a permutation of its 80 kept channels"),
        ({"acts": {"blocks.0.attn.a_in": ACTS}}, r"rounded in runs of \[40, 8\], but .*q_proj has runs of \[48\]"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    layout = build_layout(tiny_model("llama").config)
    with pytest.raises(PlanError, match=message):
        resolve(make_plan(layout, cuts=CUTS).model_copy(update=change), layout)
