"""Plans for tiny models: by hand, and at random."""

import random
from collections.abc import Callable, Mapping

from trimbit.model.layout import Layout, Weight
from trimbit.plan import ModelRef, Plan, Provenance
from trimbit.precision import Run, parse_precision

REF = ModelRef(id="tiny", config_hash="0", weights_hash="0")
FOUND = Provenance(
    method="by hand",
    recipe_hash="0",
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
    """Any cuts, empty ones and permutations too; up to three runs a weight; biases on some of what may have them."""
    rng = random.Random(seed)

    def formats(_: Weight, cols: int) -> tuple[Run, ...]:
        ends = [*sorted(rng.sample(range(1, cols), min(rng.randrange(3), cols - 1))), cols]
        return runs(*((end - start, rng.choice(FORMATS)) for start, end in zip([0, *ends], ends, strict=False)))

    dims = {unit.dim: unit.size for unit in layout.units.values() if unit.dim}
    cuts = {
        dim: tuple(rng.sample(range(size), rng.randint(0, size))) for dim, size in dims.items() if rng.random() < 0.5
    }
    out = [unit.out_weight for unit in layout.units.values() if unit.out_weight and cuts.get(unit.dim, (0,))]
    return make_plan(layout, formats, cuts, tuple(name for name in out if rng.random() < 0.5))
