"""A rotated model computes the same, is as large as its plan says, and rounds what the rotation has evened out."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from plans import make_plan, runs
from rotations import GPTQ, ROTATION, RTN, dense_h, dense_q, rotated, sample, streams, write
from tiny import MODEL_TYPES, randomize, save_tiny, tiny_config, tiny_model
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import LayoutError, PlanError
from trimbit.kernels.acts import round_activations
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.families import FAMILIES
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.model.forward.stream import build_skeleton
from trimbit.model.resolved import resolve
from trimbit.runtime.restructure import restructure
from trimbit.schema.activations import ActInt, ActRun
from trimbit.schema.plan import load_plan
from trimbit.schema.structure import Structure
from trimbit.transform.rotate import fold, require_rotatable
from written import collected

ROTATABLE = [name for name in MODEL_TYPES if not name.startswith("gemma")]


ACT = ActInt(bits=4, group=32, clip=0.9)


TABLES = {"embed_tokens", "lm_head"}


def logits(model, seed=1):
    with torch.no_grad():
        return model(sample(3, seed), use_cache=False).logits


@pytest.mark.parametrize("model_type", ROTATABLE)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_rotated_model_computes_the_same(model_type, tied, tmp_path):
    """As the runtime has it, as one whole, and block by block; its weights are others."""
    model = tiny_model(model_type, tied=tied)
    table = model.get_input_embeddings().weight.data
    table.copy_(table.bfloat16())  # as a stream holds it
    save_tiny(model, tmp_path / "original")
    stream = streams(tmp_path / "original", ROTATION)
    layout, want = stream.layout, logits(model)

    runtime = build_skeleton(stream.checkpoint.config, torch.float32)
    restructure(runtime, layout, resolve(rotated(make_plan(layout)), layout).structure)
    state = {name: stream.checkpoint.tensor(name) for name, _ in runtime.named_parameters()}
    runtime.load_state_dict(state, strict=False, assign=True)
    torch.testing.assert_close(logits(runtime), want, rtol=0, atol=1e-4)

    torch.testing.assert_close(logits(InMemoryModel(stream).model), want, rtol=0, atol=1e-4)

    hidden = stream.embed(sample(3, 1))
    for index in range(layout.blocks):
        hidden = stream.run(index, stream.load(index), hidden)
    torch.testing.assert_close(stream.head()(stream.final_norm(hidden)), want, rtol=0, atol=1e-4)

    gains = [tensor for name, tensor in state.items() if name.endswith("layernorm.weight")]
    assert len(gains) == 6
    assert all(bool((gain == 1).all()) for gain in gains)
    plain = open_checkpoint(tmp_path / "original")
    for name in layout.weights:
        same = torch.equal(stream.checkpoint.tensor(f"{name}.weight"), plain.tensor(f"{name}.weight"))
        assert same is (layout.weights[name].unit in {"embed", "head"}), name


def test_biases_of_every_weight_are_rotated(tmp_path):
    config = tiny_config("llama")
    config.attention_bias = config.mlp_bias = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_tiny(model, tmp_path / "original")
    stream = streams(tmp_path / "original", ROTATION)
    torch.testing.assert_close(logits(InMemoryModel(stream).model), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_what_is_written_computes_the_same_at_the_same_bytes(model_type, tmp_path):
    """In bf16, whose rounding is all that it loses; with a dropped sub-block, cut KV groups and a refit, too."""
    save_tiny(tiny_model(model_type).bfloat16(), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    cuts = {"blocks.0.mlp.mid": (), "blocks.1.attn.kv": (2, 0), "blocks.2.attn.kv": ()}
    biases = ("model.layers.1.self_attn.o_proj",)
    for at, plan in enumerate([make_plan(layout), make_plan(layout, cuts=cuts, biases=biases)]):
        want, exact = write(tmp_path / "original", tmp_path / f"plain-{at}", plan)
        small, kl = write(tmp_path / "original", tmp_path / f"small-{at}", rotated(plan))
        off = (logits(small) - logits(want)).abs()  # as the CPU rounds, a refit may choose the ridge next to it
        assert float(off.mean()) < 0.03
        assert float(off.max()) < 0.3
        assert kl == pytest.approx(exact, rel=1e-2, abs=1e-4)
        assert (
            weight_nbytes(tmp_path / f"small-{at}")
            == resolve(rotated(plan), layout).file_nbytes
            == resolve(plan, layout).file_nbytes
        )
        tensors = load_file(tmp_path / f"small-{at}/model.safetensors")
        assert tensors.keys() == load_file(tmp_path / f"plain-{at}/model.safetensors").keys()
        assert load_plan(tmp_path / f"small-{at}/plan.json").rotation == ROTATION
        structure = json.loads((tmp_path / f"small-{at}/config.json").read_text())["structure"]
        assert Structure.model_validate_json(json.dumps(structure)).rotation == ROTATION


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_orders_are_of_the_rotated_channels(model_type, tmp_path):
    """They change nothing; one of the last projection's inputs has to be stored now."""
    save_tiny(tiny_model(model_type), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plain = rotated(make_plan(layout))
    generator = torch.Generator().manual_seed(0)
    inside = torch.cat([torch.randperm(8, generator=generator).repeat(2, 1) for _ in range(3)])
    orders = {
        weight.site: tuple(torch.randperm(weight.cols, generator=generator).tolist())
        for weight in layout.weights.values()
        if layout.readers(weight.site)
    } | {"blocks.1.attn.o_in": tuple((inside + torch.arange(6)[:, None] * 8).flatten().tolist())}
    ordered = plain.model_copy(update={"orders": orders})
    assert set(resolve(ordered, layout).structure.gathers) == orders.keys() - {"blocks.1.attn.o_in"}
    want, _ = write(tmp_path / "original", tmp_path / "plain", plain)
    small, _ = write(tmp_path / "original", tmp_path / "ordered", ordered)
    torch.testing.assert_close(logits(small), logits(want), rtol=0, atol=1e-5)
    assert (
        weight_nbytes(tmp_path / "ordered") == resolve(ordered, layout).file_nbytes > resolve(plain, layout).file_nbytes
    )


@pytest.mark.parametrize("method", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_inputs_are_rounded_after_the_rotation(model_type, method, tmp_path):
    """Against a dense model with an unrotated stream, the stored weights, and turns by hooks with whole matrices."""
    save_tiny(tiny_model(model_type).bfloat16(), tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plan = rotated(make_plan(layout, lambda w, n: runs((n, "bf16" if w.role in TABLES else "int5g32"))))
    sites = {w.site: w.cols for w in layout.weights.values() if layout.readers(w.site)}
    orders = {"blocks.1.mlp.mid": tuple(torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist())}
    acts = {site: (ActRun(count=count, precision=ACT),) for site, count in sites.items()}
    plan = plan.model_copy(update={"orders": orders, "acts": acts})
    small, _ = write(tmp_path / "original", tmp_path / "small", plan, method)

    want = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    q, h = dense_q(48).float(), dense_h(80).float()
    for name, weight in layout.weights.items():
        if not layout.readers(weight.site):
            continue
        module = want.get_submodule(name)
        module.weight.data = small.get_submodule(name).dense(torch.float32)
        order = list(orders.get(weight.site, range(weight.cols)))
        into = {"hidden": q, "mid": h}.get(weight.col_axis, torch.eye(weight.cols))
        if weight.col_axis == "hidden":
            module.register_forward_pre_hook(lambda _m, x, a=acts[weight.site]: (round_activations(x[0] @ q, a),))
        else:
            module.register_forward_pre_hook(
                lambda _m, x, t=into, o=order, a=acts[weight.site]: (round_activations((x[0] @ t)[..., o], a),)
            )
            module.register_forward_hook(lambda _m, _x, y: y @ q.T)
        if weight.bias:
            module.bias.data = small.get_submodule(name).bias.data
    for name, module in want.named_modules():
        if name.endswith("layernorm"):
            nn.init.ones_(module.weight)
    off = (logits(small) - logits(want)).abs()
    assert float((off < 2e-4).float().mean()) > 0.8  # an input that is rounded the other way moves what follows
    for module in want.modules():
        module._forward_pre_hooks.clear()
    assert float(((logits(small) - logits(want)).abs() < 2e-4).float().mean()) < 0.1


@pytest.mark.parametrize(("method", "bits"), [(RTN, 8), (GPTQ, 4)], ids=["rtn of 8 bits", "gptq of 4 bits"])
def test_outliers_of_the_stream_no_longer_matter(method, bits, tmp_path):
    """In each group of channels of the stream one is 30 times the others, and what reads it is as much smaller."""
    config, outliers = tiny_config("llama"), [5, 70, 150, 255, 280]
    config.hidden_size, config.intermediate_size = 288, 96
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomize(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name or "o_proj" in name or "down_proj" in name:
                (weight.T if "embed" in name else weight)[outliers] *= 30
            elif weight.dim() == 2:
                weight[:, outliers] /= 30
    save_tiny(model, tmp_path / "original")
    layout = build_layout(open_checkpoint(tmp_path / "original").config)
    plan = make_plan(layout, lambda w, n: runs((n, "bf16" if w.role in TABLES else f"int{bits}g64")))
    sites = {w.site: w.cols for w in layout.weights.values() if layout.readers(w.site)}
    act = ActInt(bits=4, group=64, clip=0.9)
    plan = plan.model_copy(update={"acts": {s: (ActRun(count=n, precision=act),) for s, n in sites.items()}})
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32))
    found = {}
    for name, own in (("plain", plan), ("rotated", rotated(plan))):
        small, kl = write(tmp_path / "original", tmp_path / name, own, method)
        found[name] = ((logits(small) - dense).square().mean().item(), kl)
    assert found["rotated"][0] < 0.5 * found["plain"][0]
    assert found["rotated"][1] < 0.5 * found["plain"][1]


def test_statistics_are_those_of_the_plain_model_turned(tmp_path):
    save_tiny(tiny_model("llama"), tmp_path / "original")
    plain, turned = (
        collected(streams(tmp_path / "original", rotation), sample(70, 0), tmp_path / str(rotation))
        for rotation in (None, ROTATION)
    )
    checkpoint = open_checkpoint(tmp_path / "original")
    q, h = dense_q(48), dense_h(80)
    heads = torch.block_diag(*[dense_h(8)] * 6)
    for block in range(3):
        for site, norm, basis in (
            ("attn.a_in", "input_layernorm", q),
            ("attn.o_in", None, heads),
            ("mlp.m_in", "post_attention_layernorm", q),
            ("mlp.mid", None, h),
        ):
            own = plain.moments(f"blocks.{block}.{site}")
            gain = torch.ones(len(basis))
            if norm is not None:
                gain = checkpoint.tensor(f"model.layers.{block}.{norm}.weight").float()
            basis = (basis / gain.double()[:, None]).float()
            found = turned.moments(f"blocks.{block}.{site}")
            want = basis.T @ own.h @ basis
            assert (found.h - want).norm() < 0.01 * want.norm(), site
            assert (own.h - want).norm() > 0.3 * want.norm(), site
            torch.testing.assert_close(found.mean, basis.T @ own.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(turned.moments("head_in").h, plain.moments("head_in").h, rtol=0, atol=0.01)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_gain_of_every_row_is_what_its_norms_multiply_by(model_type):
    model = tiny_model(model_type)
    norm = model.model.norm
    nn.init.zeros_(norm.weight)
    given = norm(torch.randn(2, 48, generator=torch.Generator().manual_seed(0)))
    assert bool((given == 0).all()) is (FAMILIES[model_type].gain == "weight")


@pytest.mark.parametrize(
    ("model_type", "changes", "error", "message"),
    [
        ("gemma2", {}, LayoutError, "gemma2 cannot be rotated: post_attention_layernorm scales"),
        ("gemma3_text", {}, LayoutError, "gemma3_text cannot be rotated: post_attention_layernorm scales"),
        ("llama", {"intermediate_size": 92}, PlanError, r"intermediate_size is 92, but no Hadamard matrix of order 92"),
        ("llama", {"hidden_size": 54}, PlanError, r"hidden_size is 54, but no Hadamard matrix of order 54"),
        ("qwen3", {"head_dim": 6}, PlanError, r"head_dim is 6, but no Hadamard matrix of order 6"),
    ],
)
def test_a_model_that_cannot_be_rotated_is_refused(model_type, changes, error, message):
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(error, match=message):
        require_rotatable(build_layout(config))


def test_only_the_tensors_change(job):
    checkpoint = open_checkpoint(job.model)
    folded = fold(checkpoint, build_layout(checkpoint.config), ROTATION)
    assert folded.names == checkpoint.names
    assert folded.weights_hash() == checkpoint.weights_hash()
    assert {folded.tensor(name).shape == checkpoint.shape(name) == folded.shape(name) for name in folded.names} == {
        True
    }
