"""Damage of groups of channels, against that of whole sites and against what the model does without them."""

from functools import partial

import pytest
import torch
from scipy.stats import spearmanr

from measured import INT2, INT4, REF, SPACE, TOKENS
from trimbit.calibrate.sensitivity import Change, sweep
from trimbit.measure.channels import predict_groups
from trimbit.measure.predict import predict
from trimbit.measure.variants import measure_variants
from trimbit.model.forward.replaced import weights_replaced
from trimbit.transform.quant import gptq
from trimbit.trial.expected import ExpectedErrors

SIZE = 8  # channels of a group
SITES = ("blocks.0.attn.a_in", "blocks.1.mlp.m_in", "blocks.1.mlp.mid", "blocks.2.attn.o_in")


@pytest.fixture(scope="module")
def groups(stream):
    cols = {site: stream.layout.readers(site)[0].cols for site in SITES}
    return {site: torch.arange(own) // SIZE for site, own in cols.items()}


@pytest.fixture(scope="module")
def errors(stream, candidates):
    return ExpectedErrors(stream.checkpoint, stream.layout, candidates.stats, gptq.Config())


@pytest.fixture(scope="module")
def found(stream, groups, errors):
    return predict_groups(stream, TOKENS, 4, 0, groups, (INT2, INT4), errors, lambda *_: None)


def test_formats_add_up_to_those_of_the_site(stream, candidates, errors, groups, found):
    whole = predict(
        stream, TOKENS, 4, 0, SPACE, errors, candidates.change, candidates.rankings, REF, "", lambda *_: None
    )
    known = {(one.site, one.precision): one.damage for one in whole.formats}
    assert found.keys() == groups.keys()
    for site, damage in found.items():
        assert damage.shape == (int(groups[site].max()) + 1, 3)
        assert (damage >= 0).all()
        for at, precision in enumerate((INT2, INT4), start=1):
            assert float(damage[:, at].sum()) == pytest.approx(known[site, precision], rel=1e-4)


@pytest.mark.parametrize("site", ["blocks.1.mlp.mid", "blocks.2.attn.o_in"])
def test_a_group_that_goes_is_a_change_of_its_columns(stream, groups, found, site):
    (weight,) = stream.layout.readers(site)
    w = stream.checkpoint.tensor(f"{weight.name}.weight").float()

    def changes(index):
        if not site.startswith(f"blocks.{index}."):
            return {}
        without = {str(at): w * (groups[site] == at) for at in range(int(groups[site].max()) + 1)}
        return {at: Change(weight=weight.name, delta=-own, bias=torch.zeros(len(w))) for at, own in without.items()}

    expected = {}
    for own in sweep(stream, TOKENS, 4, 0, changes, lambda *_: None):
        expected |= own.changes
    for at, damage in expected.items():
        assert float(found[site][int(at), 0]) == pytest.approx(damage, rel=1e-4)


def test_the_order_is_that_of_what_is_measured(stream, groups, found, tmp_path):
    def without(site, at):
        weights = {f"{one.name}.weight": one for one in stream.layout.readers(site)}
        return {name: stream.checkpoint.tensor(name).float() * (groups[site] != at) for name in weights}

    variants = {index: {} for index in range(stream.layout.blocks)}
    for site, own in groups.items():
        index = int(site.split(".")[1])
        for at in range(int(own.max()) + 1):
            state, prefix = partial(without, site, at), f"{stream.layout.family.blocks}.{index}."
            variants[index][f"{site} {at}"] = partial(weights_replaced, state=state, prefix=prefix)
    measured = measure_variants(stream, TOKENS, variants, tmp_path, lambda *_: None)
    predicted = {f"{site} {at}": float(one) for site, own in found.items() for at, one in enumerate(own[:, 0])}
    names = sorted(measured)
    assert len(names) > 20
    assert spearmanr([measured[one] for one in names], [predicted[one] for one in names]).statistic > 0.8
