"""The judge against a KL of full logits; a measurement that was broken off goes on and ends the same."""

import pytest

from measured import INT2, INT4, REF, SPACE, TOKENS
from trimbit.jobs.journal import Journal
from trimbit.measure.choices import allowed_formats, allowed_widths, sites_of
from trimbit.measure.damage import measure
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.schema.measurements import Background, Measurements


def background(layout, fmt=INT4, widths=None):
    return Background(
        widths=widths or {}, formats={site: fmt for unit in layout.units.values() for site in sites_of(layout, unit)}
    )


def run(stream, candidates, journal, progress=lambda *_: None, space=SPACE, around=None):
    around = around or background(stream.layout)
    probe = KLProbe(InMemoryModel(stream), TOKENS)
    return measure(probe, stream.layout, candidates, space, around, journal, REF, "digest", 0, progress)


def entries(journal):
    return Journal(journal).read()


@pytest.fixture(scope="module")
def measured(stream, candidates, tmp_path_factory):
    return run(stream, candidates, tmp_path_factory.mktemp("journal") / "all.jsonl")


def test_every_choice_is_measured(stream, candidates, measured):
    layout = stream.layout
    sites = {
        (site, p.name) for u in layout.units.values() for site in sites_of(layout, u) for p in allowed_formats(u, SPACE)
    }
    widths = {(unit.dim, w) for unit in layout.units.values() if unit.dim for w in allowed_widths(layout, unit, SPACE)}
    assert {(m.site, m.precision.name) for m in measured.formats} == sites
    assert {(m.dim, m.width) for m in measured.widths} == widths
    assert {width for dim, width in widths if dim.endswith("kv")} == {0, 1, 2, 3}
    assert {width for dim, width in widths if dim.endswith("mid")} == {0, 32, 80}
    assert all(m.damage == 0 for m in measured.formats if m.precision == INT4)  # the background itself
    assert all(m.damage == 0 for m in measured.widths if m.width == layout.unit_of_dim(m.dim).size)
    assert measured.rankings == candidates.rankings
    assert Measurements.model_validate_json(measured.model_dump_json()) == measured


def test_a_damage_is_the_difference_to_the_background(stream, candidates, measured):
    probe = KLProbe(InMemoryModel(stream), TOKENS)
    layout, base = stream.layout, background(stream.layout).formats
    for unit in layout.units.values():
        probe.whole.install(candidates.unit_state(unit, unit.size, dict.fromkeys(sites_of(layout, unit), INT4)))
    around = probe.damage(None)
    assert measured.background_damage == pytest.approx(around, rel=1e-6)
    unit, site = layout.units["blocks.1.mlp"], "blocks.1.mlp.m_in"
    own = {s: base[s] for s in sites_of(layout, unit)}
    probe.whole.install(candidates.unit_state(unit, 80, {**own, site: INT2}))
    (found,) = (m.damage for m in measured.formats if (m.site, m.precision) == (site, INT2))
    assert found == pytest.approx(probe.damage(None) - around, abs=1e-6)
    assert found > 0
    probe.whole.install(candidates.unit_state(unit, 32, own))
    (found,) = (m.damage for m in measured.widths if (m.dim, m.width) == (unit.dim, 32))
    assert found == pytest.approx(probe.damage(None) - around, abs=1e-6)


class Counting:
    """Candidates that count what is asked of them."""

    def __init__(self, candidates):
        self.inner, self.rankings, self.calls = candidates, candidates.rankings, 0

    def unit_state(self, unit, width, formats):
        self.calls += 1
        return self.inner.unit_state(unit, width, formats)


def test_a_journal_that_only_lacks_its_background(stream, candidates, measured, tmp_path):
    journal = tmp_path / "journal.jsonl"
    assert run(stream, candidates, journal) == measured
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"background"' not in line))
    assert run(stream, candidates, journal) == measured


def test_resumes_after_a_kill(stream, candidates, measured, tmp_path):
    journal, units = tmp_path / "journal.jsonl", len(stream.layout.units)
    work = len(measured.formats) + len(measured.widths) - units_and_sites(stream.layout)

    def kill(done, _total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stream, candidates, journal, kill)
    assert len(entries(journal)) == 1 + 10  # the background first
    again, steps = Counting(candidates), []
    assert run(stream, again, journal, lambda *step: steps.append(step)) == measured
    assert again.calls == units + work - 10  # the background, and what was left
    assert steps == [(done, work) for done in range(10, work + 1)]
    assert len(entries(journal)) == work + 1
    third = Counting(candidates)
    assert run(stream, third, journal) == measured
    assert third.calls == 0


def units_and_sites(layout):
    """How many choices are the background itself: a format for each site, a width for each dim."""
    return sum(len(sites_of(layout, u)) + (u.dim is not None) for u in layout.units.values())


@pytest.mark.parametrize("cut", [1, 20, 43])
def test_a_torn_last_line_is_measured_again(stream, candidates, measured, tmp_path, cut):
    journal = tmp_path / "journal.jsonl"

    def kill(done, _total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stream, candidates, journal, kill)
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert run(stream, candidates, journal) == measured
    assert run(stream, candidates, journal) == measured


def test_another_space_shares_the_journal(stream, candidates, measured, tmp_path):
    journal = tmp_path / "journal.jsonl"
    small = SPACE.model_copy(update={"prune_kv_groups": False, "widths": (1.0, 0.5)})
    run(stream, candidates, journal, space=small)
    known = len(entries(journal))
    again = Counting(candidates)
    assert run(stream, again, journal) == measured
    assert again.calls < len(stream.layout.units) + known


def test_another_ranking_is_measured_anew(stream, candidates, measured, tmp_path):
    journal = tmp_path / "journal.jsonl"
    run(stream, candidates, journal)
    other = Counting(candidates)
    other.rankings = {**candidates.rankings, "blocks.0.mlp.mid": tuple(range(80))}
    run(stream, other, journal)
    changes = [entry["change"] for entry in entries(journal)]
    cuts = [change for change in changes if change.startswith("blocks.0.mlp.mid=32")]
    assert len(set(cuts)) == len(cuts) == 2


def test_formats_of_a_unit_that_the_background_drops(stream, candidates, tmp_path):
    """They are measured with the unit put back, against the unit put back in the background's format."""
    dim = "blocks.1.mlp.mid"
    around = background(stream.layout, widths={dim: 0, "blocks.0.attn.kv": 2})
    found = run(stream, candidates, tmp_path / "journal.jsonl", around=around)
    widths = {m.width: m.damage for m in found.widths if m.dim == dim}
    assert widths[0] == 0
    assert widths[80] != 0
    site, unit = "blocks.1.mlp.m_in", stream.layout.units["blocks.1.mlp"]
    probe = KLProbe(InMemoryModel(stream), TOKENS)
    states = []
    for fmt in (INT4, INT2):
        for own in stream.layout.units.values():
            width = around.widths.get(own.dim, own.size) if own is not unit else 80
            formats = dict.fromkeys(sites_of(stream.layout, own), INT4)
            formats |= {site: fmt} if own is unit else {}
            probe.whole.install(candidates.unit_state(own, width, formats))
        states.append(probe.damage(None))
    (damage,) = (m.damage for m in found.formats if (m.site, m.precision) == (site, INT2))
    assert damage == pytest.approx(states[1] - states[0], abs=1e-6)
