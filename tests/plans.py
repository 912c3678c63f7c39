"""Plans for tiny models: by hand, and at random."""

import random
from collections.abc import Callable, Mapping

from trimbit.model.layout import Layout, Weight
from trimbit.schema.activations import ActInt, ActRun
from trimbit.schema.plan import ModelRef, Plan, Provenance
from trimbit.schema.precision import Run, parse_precision

REF = ModelRef(id="tiny", config_hash="0", weights_hash="0")
FOUND = Provenance(
    method="by hand",
    recipe={},
    calibration="self",
    measurement_hash=None,
    seed=0,
    predicted_damage=None,
    measured_damage=None,
    nbytes=0,
)
FORMATS = (
    "bf16",
    *(f"{kind}{group}" for kind in ("nf4", "ternary", "binary", "mbinary") for group in ("g32", "g64", "row")),
    *(f"{kind}{bits}{group}" for kind in ("int", "uint") for bits in range(2, 9) for group in ("g32", "g64", "row")),
)


def runs(*pairs: tuple[int, str]) -> tuple[Run, ...]:
    return tuple(Run(count=count, precision=parse_precision(name)) for count, name in pairs)


def make_plan(
    layout: Layout,
    formats: Callable[[Weight, int], tuple[Run, ...]] = lambda _, cols: runs((cols, "bf16")),
    cuts: Mapping[str, tuple[int, ...]] | None = None,
    biases: tuple[str, ...] = (),
) -> Plan:
    """Runs by `formats(weight, stored columns)` for every weight that the cuts leave."""
    cuts = dict(cuts or {})
    weights = {}
    for weight in layout.weights.values():
        unit = layout.units[weight.unit]
        width = len(cuts[unit.dim]) if unit.dim in cuts else unit.size
        if width or unit.dim is None:
            weights[weight.name] = formats(weight, layout.weight_shape(weight, width)[1])
    return Plan(model=REF, cuts=cuts, weights=weights, biases=biases, found_by=FOUND)


def random_plan(layout: Layout, seed: int) -> Plan:
    """Any cuts, empty ones and permutations too; up to three runs a weight; biases on some of what may have them.

    Some sites have an order, and some whose weights share their runs' lengths round their inputs.
    """
    rng = random.Random(seed)
    shared: dict[str, list[int]] = {}

    def formats(weight: Weight, cols: int) -> tuple[Run, ...]:
        ends = [*sorted(rng.sample(range(1, cols), min(rng.randrange(3), cols - 1))), cols]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        lengths = shared.setdefault(weight.site, lengths) if weight.site.endswith(("n", "mid")) else lengths
        return runs(*((length, rng.choice(FORMATS)) for length in lengths))

    dims = {unit.dim: unit.size for unit in layout.units.values() if unit.dim}
    cuts = {
        dim: tuple(rng.sample(range(size), rng.randint(0, size))) for dim, size in dims.items() if rng.random() < 0.5
    }
    out = [unit.out_weight for unit in layout.units.values() if unit.out_weight and cuts.get(unit.dim, (0,))]
    plan = make_plan(layout, formats, cuts, tuple(name for name in out if rng.random() < 0.5))
    sites = {site: lengths for site, lengths in shared.items() if layout.readers(site)}
    orders = {site: random_order(site, sum(lengths), rng) for site, lengths in sites.items() if rng.random() < 0.5}
    acts = {site: random_acts(lengths, rng) for site, lengths in sites.items() if rng.random() < 0.5}
    return plan.model_copy(update={"orders": orders, "acts": acts})


def random_order(site: str, count: int, rng: random.Random, d: int = 8) -> tuple[int, ...]:
    """Any order; half of those of attention's output stay in their heads, two of which share a V."""
    if site.endswith("o_in") and rng.random() < 0.5:
        inside = [rng.sample(range(d), d) for _ in range(count // (2 * d))]
        return tuple(d * head + i for head in range(count // d) for i in inside[head // 2])
    return tuple(rng.sample(range(count), count))


def random_acts(lengths: list[int], rng: random.Random) -> tuple[ActRun, ...]:
    kinds = (None, ActInt(bits=4, group=32, clip=0.9), ActInt(bits=8, group=None), ActInt(bits=3, group=64))
    return tuple(ActRun(count=length, precision=rng.choice(kinds)) for length in lengths)
