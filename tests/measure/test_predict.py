"""Predicted damage against measured damage of the same choices."""

import pytest
from scipy.stats import spearmanr

from measured import INT2, INT4, INT8, REF, SPACE, TOKENS
from trimbit.measure import predict as predict_module
from trimbit.measure.choices import allowed_formats, allowed_widths, sites_of
from trimbit.measure.damage import measure
from trimbit.measure.kl_probe import KLProbe
from trimbit.measure.predict import predict
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.schema.measurements import Background
from trimbit.schema.precision import BF16
from trimbit.transform.quant import rtn
from trimbit.trial.expected import ExpectedErrors


@pytest.fixture(scope="module")
def predicted(stream, candidates):
    errors = ExpectedErrors(stream.checkpoint, stream.layout, candidates.stats, rtn.Config())
    return predict(
        stream, TOKENS, 32, 0, SPACE, errors, candidates.change, candidates.rankings, REF, "digest", lambda *_: None
    )


@pytest.fixture(scope="module")
def measured(stream, candidates, tmp_path_factory):
    sites = [site for unit in stream.layout.units.values() for site in sites_of(stream.layout, unit)]
    probe = KLProbe(InMemoryModel(stream), TOKENS)
    journal = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    around = Background(widths={}, formats=dict.fromkeys(sites, BF16))
    return measure(probe, stream.layout, candidates, SPACE, around, journal, REF, "digest", 0, lambda *_: None)


def test_every_choice_is_predicted(stream, candidates, predicted):
    layout = stream.layout
    formats = [
        (s, p.name) for u in layout.units.values() for s in sites_of(layout, u) for p in allowed_formats(u, SPACE)
    ]
    widths = [(u.dim, w) for u in layout.units.values() if u.dim for w in allowed_widths(layout, u, SPACE)]
    assert [(m.site, m.precision.name) for m in predicted.formats] == formats
    assert [(m.dim, m.width) for m in predicted.widths] == widths
    assert all(m.damage > 0 and m.by == "predicted" for m in predicted.formats)
    assert all((m.damage == 0) == (m.width == layout.unit_of_dim(m.dim).size) for m in predicted.widths)
    assert predicted.background_damage == 0
    assert predicted.rankings == candidates.rankings


def test_formats_are_ranked_as_by_measuring(predicted, measured):
    found = {(m.site, m.precision.name): m.damage for m in predicted.formats}
    real = {(m.site, m.precision.name): m.damage for m in measured.formats if m.precision != BF16}
    assert found.keys() == real.keys()
    assert spearmanr([found[key] for key in real], list(real.values())).statistic > 0.9
    fine = [key for key in real if key[1] == INT4.name]
    assert sum(found[key] for key in fine) == pytest.approx(sum(real[key] for key in fine), rel=0.3)


def test_cuts_are_ranked_as_by_measuring(predicted, measured):
    full = {m.dim: max(o.width for o in measured.widths if o.dim == m.dim) for m in measured.widths}
    real = {(m.dim, m.width): m.damage for m in measured.widths if m.width != full[m.dim]}
    found = {(m.dim, m.width): m.damage for m in predicted.widths}
    assert spearmanr([found[key] for key in real], list(real.values())).statistic > 0.85


def test_finer_formats_cost_less(stream, predicted):
    by = {(m.site, m.precision.name): m.damage for m in predicted.formats}
    for unit in stream.layout.units.values():
        small, large = (INT4, INT8) if unit.block is None else (INT2, INT4)
        for site in sites_of(stream.layout, unit):
            assert by[site, small.name] > 4 * by[site, large.name]


def test_some_rows_stand_for_all(stream, candidates, predicted, monkeypatch):
    monkeypatch.setattr(predict_module, "ROWS", 24)
    errors = ExpectedErrors(stream.checkpoint, stream.layout, candidates.stats, rtn.Config())
    args = (candidates.change, candidates.rankings, REF, "digest", lambda *_: None)
    some = predict(stream, TOKENS, 32, 0, SPACE, errors, *args)
    for one, all_ in zip(some.formats, predicted.formats, strict=True):
        assert one.damage == pytest.approx(all_.damage, rel=0.3)
    assert some.formats != predicted.formats
    assert sum(one.damage for one in some.formats) == pytest.approx(
        sum(one.damage for one in predicted.formats), rel=0.05
    )
