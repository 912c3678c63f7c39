"""Choices that are measured, and predictions that are corrected by them."""

from collections import defaultdict

import pytest

from measured import INT2, REF, SPACE, TOKENS
from problems import LAYOUT
from trimbit.jobs import carried
from trimbit.measure.choices import allowed_formats, allowed_widths, sites_of
from trimbit.measure.corrected import MOST, PRIOR, Measured, anchors, corrected, count_to_measure, to_measure
from trimbit.measure.kl_probe import KLProbe
from trimbit.measure.variants import measure_variants
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.pipeline.damage import variant
from trimbit.schema.measurements import Background, FormatDamage, Measurements, WidthDamage
from trimbit.schema.precision import BF16
from trimbit.transform.quant import gptq
from trimbit.trial.expected import ExpectedErrors


def predictions(layout, space=SPACE):
    """Damage that falls from choice to choice."""
    units = list(layout.units.values())
    formats = [(s, p) for u in units for s in sites_of(layout, u) for p in allowed_formats(u, space)]
    widths = [(u, w) for u in units if u.dim for w in allowed_widths(layout, u, space)]
    return Measurements(
        model=REF, data_digest="digest", seed=0, background=Background(widths={}, formats={}), background_damage=0.0,
        rankings={},
        formats=tuple(
            FormatDamage(site=s, precision=p, damage=1 / (1 + at), by="predicted") for at, (s, p) in enumerate(formats)
        ),
        widths=tuple(
            WidthDamage(dim=u.dim, width=w, damage=0.0 if w == u.size else 1 / (2 + at), by="predicted")
            for at, (u, w) in enumerate(widths)
        ),
    )  # fmt: skip


def is_few(one, layout):
    return one.precision == INT2 and one.site not in layout.units


DAMAGES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


@pytest.fixture
def errors(stream, candidates):
    return ExpectedErrors(stream.checkpoint, stream.layout, candidates.stats, gptq.Config())


@pytest.fixture
def changes(stream, candidates, errors):
    found = defaultdict(dict)
    for one in to_measure(predictions(stream.layout), stream.layout):
        found[one.unit.block][one.name] = variant(stream.layout, lambda: candidates, errors, one)
    return found


def test_each_is_measured_as_in_the_whole_model(stream, candidates, errors, changes, tmp_path):
    whole, steps = InMemoryModel(stream), []
    probe = KLProbe(whole, TOKENS)
    found = measure_variants(stream, TOKENS, changes, tmp_path, lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    choices = {one.name: one for one in to_measure(predictions(stream.layout), stream.layout)}
    assert found.keys() == choices.keys()
    assert {name.rpartition("=")[2] for name in found if "=" in name} > {"0"}
    for name, one in choices.items():
        layout, width = stream.layout, getattr(one.choice, "width", one.unit.size)
        if isinstance(one.choice, FormatDamage):
            state = errors.site_state(one.choice.site, INT2)
        else:
            state = candidates.unit_state(one.unit, width, dict.fromkeys(sites_of(layout, one.unit), BF16))
        before = whole.current(tuple(state))
        whole.install(state)
        assert found[name] == pytest.approx(probe.damage(None), rel=1e-2, abs=1e-4)
        whole.install(before)


def test_the_sweep_goes_on_after_a_kill_and_leaves_the_model_as_it_was(stream, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "SECONDS", 0)
    whole = measure_variants(stream, TOKENS, changes, tmp_path / "whole", lambda *_: None)

    def kill(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_variants(stream, TOKENS, changes, tmp_path / "killed", kill)
    steps = []
    again = measure_variants(stream, TOKENS, changes, tmp_path / "killed", lambda *step: steps.append(step))
    assert again == whole
    assert steps == [(3, 3)]
    assert list((tmp_path / "killed").iterdir()) == []


def ratio(name):
    """What is measured, as a multiple of what is predicted."""
    if ".mid=" in name:
        return 0.5
    return 2.0 if ".kv=" in name else 3.0


def test_a_kind_is_corrected_by_its_anchors(stream):
    layout = stream.layout
    found = predictions(layout)
    chosen = {one.name: one.choice for one in to_measure(found, layout)}
    measured = {name: 7.0 if name.endswith("=0") else one.damage * ratio(name) for name, one in chosen.items()}
    after = corrected(found, layout, measured)
    corrections = {one.kind: one for one in after.corrections}
    assert {"kv cut", "mid cut", "blocks.0.mlp.mid cut", "blocks.2.attn.kv cut"} <= corrections.keys()
    for kind, one in corrections.items():
        prior = PRIOR if kind in {"kv cut", "mid cut"} else 0
        share = len(one.anchors) / (len(one.anchors) + prior)
        assert one.factor == pytest.approx(ratio(one.anchors[0].name) ** share)
        assert all(own.predicted == chosen[own.name].damage for own in one.anchors)
    for one, before in zip(after.widths, found.widths, strict=True):
        if one.width == 0:
            assert (one.damage, one.by) == (7.0, "measured")
        elif before.damage:
            own = corrections.get(f"{one.dim} cut") or corrections[f"{one.dim.rpartition('.')[2]} cut"]
            assert one.damage == pytest.approx(before.damage * own.factor)
            assert one.by == "predicted"
    for one, before in zip(after.formats, found.formats, strict=True):
        factor = corrections[f"{one.site} below 3 bits"].factor if is_few(one, layout) else 1
        assert one.damage == pytest.approx(before.damage * factor)


@pytest.mark.parametrize(("real", "factor"), [(-1.0, 1 / MOST), (1e3, MOST)])
def test_one_measurement_never_outweighs_the_prediction(stream, real, factor):
    found = predictions(stream.layout)
    measured = defaultdict(lambda: real)
    few = [one for one in corrected(found, stream.layout, measured).corrections if "below" in one.kind]
    assert few
    assert all(one.factor == pytest.approx(factor) for one in few)


def test_anchors_go_from_the_largest_damage_to_the_smallest_that_matters():
    choices = [
        Measured(unit=LAYOUT.units["blocks.0.mlp"], choice=WidthDamage(dim="mid", width=at, damage=own))
        for at, own in enumerate(DAMAGES)
    ]
    assert [one.choice.damage for one in anchors(choices, 1)] == [8.0]
    assert [one.choice.damage for one in anchors(choices, 4)] == [8.0, 4.0, 2.0]  # the first is worth two steps
    assert [one.choice.damage for one in anchors(choices, 99)] == DAMAGES


@pytest.mark.parametrize("widths", [(1.0, 0.5, 0.0), (1.0, 0.5), (1.0,)])
def test_how_many_are_measured_is_known_before(stream, widths):
    space = SPACE.model_copy(update={"widths": widths, "prune_kv_groups": len(widths) == 3})
    count = count_to_measure(stream.layout, space)
    assert len(to_measure(predictions(stream.layout, space), stream.layout)) <= count
    assert (count > 0) == (len(to_measure(predictions(stream.layout, space), stream.layout)) > 0)
