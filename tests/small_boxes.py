"""Boxes of choices with invented damage."""

import itertools
import random
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

from trimbit.search.solvers.bayes import Config
from trimbit.search.solvers.box import Box

QUICK = Config(pool=32, near=16, steps=15, samples=32)


levels = st.lists(st.integers(0, 1000), min_size=1, max_size=4, unique=True).map(sorted)


shares = st.integers(0, 100)


def box_of(costs, share):
    """A space of which anything from one point to all of them fits."""
    least, most = sum(own[0] for own in costs), sum(own[-1] for own in costs)
    values = tuple(tuple(float(at) for at in range(len(own))) for own in costs)
    return Box(costs=tuple(map(tuple, costs)), values=values, room_nbytes=least + (most - least) * share // 100)


def everything(box):
    """All points that fit, counted without the code under test."""
    points = itertools.product(*(range(len(own)) for own in box.costs))
    return [at for at in points if sum(own[i] for own, i in zip(box.costs, at, strict=True)) <= box.room_nbytes]


def float_sum(point):
    return float(sum(point))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def binary(seed, levels=20, share=0.3):
    """A space of two formats for each of many weights, and a damage with a term for each and for some pairs."""
    rng = random.Random(seed)
    sizes = [rng.choice([100, 300, 1000]) for _ in range(levels)]
    costs = tuple((4 * size, 8 * size) for size in sizes)
    box = Box(costs=costs, values=((2.0, 3.0),) * levels, room_nbytes=int((4 + 4 * share) * sum(sizes)))
    own = [rng.expovariate(1) * size**0.5 for size in sizes]
    pairs = {pair: rng.gauss(0, 3) for pair in itertools.combinations(range(levels), 2) if rng.random() < 0.2}

    def damage(point):
        error = [(1.0, 0.25)[level] for level in point]
        both = sum(w * error[i] * error[j] for (i, j), w in pairs.items())
        return sum(w * e for w, e in zip(own, error, strict=True)) + both

    return box, damage


def run(method, box, damage, config, *, start=(), known=None, seed=0, stop=None):
    """All that a run did; `known` is what an interrupted run has found, `stop` kills it after so many new results."""
    done = SimpleNamespace(evaluated=[], record=dict(known or {}), progress=[])

    def evaluate(points):
        assert 0 < len(points) <= max(config.initial, config.batch)
        for point in reversed(points):  # as processes may be done with them
            if point not in done.record:
                if len(done.evaluated) == stop:
                    raise KeyboardInterrupt
                done.evaluated.append(point)
                done.record[point] = damage(point)
            yield point, done.record[point]

    try:
        done.found = method(box, start, evaluate, config, seed, lambda *at: done.progress.append(at))
    except KeyboardInterrupt:
        done.found = None
    return done
