"""The moments that the quantiser reads for a weight of the dense model."""

from trimbit.calibrate.moments import Moments
from trimbit.calibrate.stats import Stats
from trimbit.model.layout import Layout, Weight
from trimbit.transform.weight import identity_moments, tied_moments


def moments_of(layout: Layout, stats: Stats | None, weight: Weight) -> Moments | None:
    """The moments of the weight's site; for a tied embedding, of the lookup and the head together."""
    if stats is None:
        return None
    if weight.unit == "embed":
        return tied_moments(stats.moments("head_in")) if layout.tied else identity_moments(weight.cols)
    return stats.moments(weight.site)
