"""The weights of every choice, made from the dense model alone and kept on disk, to measure damage and to try plans.

A candidate has the full shape: cut rows and columns are zero, which computes the same as removing them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.calibrate.sensitivity import Change
from trimbit.calibrate.stats import Stats
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.jobs.progress import Progress
from trimbit.kernels.acts import take_channels
from trimbit.measure.choices import allowed_formats, format_of, sites_of
from trimbit.model.channels import cut_channels
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.forward.stream import CPU
from trimbit.model.layout import Layout, Unit, Weight
from trimbit.schema.base import digest
from trimbit.schema.precision import BF16, Precision, Run
from trimbit.schema.space import Space
from trimbit.transform.repair import refit
from trimbit.transform.weight import Compressed, WeightCompressor
from trimbit.trial.moments import moments_of

RIDGE = refit.Config(ridges=(0.01,))  # ours; there are no held-out moments here


class CandidateWeights:
    """Compressed weights by unit, width and format; each is made once."""

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, stats: Stats | None, compressor: WeightCompressor, folder: Path,
        rankings: Mapping[str, tuple[int, ...]], space: Space | None, *, rank: int = 0, refits: bool = True,
        orders: Mapping[str, Tensor] = MappingProxyType({}), device: torch.device = CPU, ahead: bool = False,
    ) -> None:  # fmt: skip
        """`device` is where weights are compressed; what is returned is on the CPU.

        `ahead`: once a weight is asked for in one format, make it in all formats of the space.
        """
        self.checkpoint = checkpoint
        self.layout = layout
        self.stats = stats
        self.compressor = compressor
        self.folder = folder
        self.rankings = rankings
        self.space = space
        self.rank = rank
        self.refits = refits
        self.orders = orders  # of the columns, by site
        self.device = device
        self.ahead = ahead

    def unit_state(self, unit: Unit, width: int | None, formats: Mapping[str, Precision]) -> dict[str, Tensor]:
        """Parameters of a unit by name, each weight in its or its site's format; the output weight has a bias, too."""
        state: dict[str, Tensor] = {}
        keep = None
        if unit.dim is not None and width is not None and width != unit.size:
            keep = tuple(sorted(self.rankings[unit.dim][:width]))
        for site, names in sites_of(self.layout, unit).items():
            for name in names:
                weight, precision = self.layout.weights[name], format_of(formats, site, name)
                if name == unit.out_weight:
                    state |= self.out_state(unit, weight, keep, precision)
                elif keep and self.rank:
                    state[f"{name}.weight"] = self._cut_rows(unit, weight, keep, precision)
                else:
                    state[f"{name}.weight"] = self.compressed(weight, precision).dense(torch.bfloat16)
        return state

    def out_state(
        self, unit: Unit, weight: Weight, keep: tuple[int, ...] | None, precision: Precision
    ) -> dict[str, Tensor]:
        """The weight that writes to the residual stream, and its bias."""
        name = weight.name
        if keep is None:
            dense = self.compressed(weight, precision).dense(torch.bfloat16)
            return {f"{name}.weight": dense, f"{name}.bias": self._bias(weight)}
        if not keep:
            return {f"{name}.weight": torch.zeros(weight.rows, weight.cols), f"{name}.bias": torch.zeros(weight.rows)}
        return self._cut_columns(unit, weight, keep, precision)

    def change(self, unit: Unit, width: int) -> Change:
        """The change in the weight that writes to the residual stream at a narrower width, refitted if asked."""
        state = self.cut_state(unit, width)
        weight = self.layout.weights[unit.out_weight or ""]
        return Change(
            weight=weight.name, delta=state[f"{weight.name}.weight"].float() - self._dense(weight),
            bias=state[f"{weight.name}.bias"] - self._bias(weight),
        )  # fmt: skip

    def cut_state(self, unit: Unit, width: int) -> dict[str, Tensor]:
        """The weight that writes to the residual stream at a narrower width, and its bias; nothing is quantised."""
        assert unit.dim is not None
        assert unit.out_weight is not None
        weight, keep = self.layout.weights[unit.out_weight], tuple(sorted(self.rankings[unit.dim][:width]))
        return self.out_state(unit, weight, keep, BF16)

    def moments(self, weight: Weight) -> Moments | None:
        """The moments that the quantiser reads for a weight."""
        found = moments_of(self.layout, self.stats, weight)
        return found if found is None or weight.site not in self.orders else found.at(self.orders[weight.site])

    def compressed(self, weight: Weight, precision: Precision) -> Compressed:
        """The whole weight in one format."""
        runs = (Run(count=weight.cols, precision=precision),)
        tensors = self._kept(self._path(weight, precision), partial(self._make, weight, precision))
        return Compressed.of(tensors, weight.name, runs)

    def make(self, progress: Progress) -> None:
        """Make all candidates of a search over bits alone: every weight, cut as `space.kept` says, in every format."""
        assert self.space is not None
        units = [unit for unit in self.layout.units.values() if unit.block is not None]
        for at, unit in enumerate(units):
            for precision in allowed_formats(unit, self.space):
                formats = dict.fromkeys(sites_of(self.layout, unit), precision)
                self.unit_state(unit, self.space.kept.get(unit.dim or "", unit.size), formats)
            progress(at + 1, len(units))

    def _there(self, moments: Moments | None) -> Moments | None:
        return None if moments is None else moments.to(self.device)

    def _rank(self, weight: Weight) -> int:
        return self.rank if self.layout.units[weight.unit].block is not None else 0

    def _path(self, weight: Weight, precision: Precision, keep: tuple[int, ...] | None = None) -> Path:
        cut = "" if keep is None else f"{len(keep)}.{digest(keep)}."
        return self.folder / f"{weight.name}.{cut}{precision.name}.safetensors"

    def _make(self, weight: Weight, precision: Precision) -> None:
        """Compress all weights of a site at once: they share the input and its factor."""
        unit = self.layout.units[weight.unit]
        members = [self.layout.weights[name] for name in unit.weights if self.layout.weights[name].site == weight.site]
        others = allowed_formats(unit, self.space) if self.ahead and self.space and unit.block is not None else ()
        menu = dict.fromkeys((precision, *others))
        work = [(member, p) for member in members for p in menu if not self._path(member, p).exists()]
        if not work:  # another process has made them meanwhile
            return
        dense = {member.name: self._dense(member).to(self.device) for member in members}
        made = self.compressor.compress(
            [dense[m.name] for m, _ in work], self._there(self.moments(weight)), [m.name for m, _ in work],
            [(Run(count=m.cols, precision=p),) for m, p in work], [self._rank(m) for m, _ in work],
        )  # fmt: skip
        for (member, p), one in zip(work, made, strict=True):
            save_tensors(self._path(member, p), one.tensors(member.name))

    def _dense(self, weight: Weight) -> Tensor:
        dense = self.checkpoint.tensor(f"{weight.name}.weight").float()
        return take_channels(dense, self.orders[weight.site]) if weight.site in self.orders else dense

    def _bias(self, weight: Weight) -> Tensor:
        """The original's bias as it is stored; zeros if there is none."""
        if not weight.bias:
            return torch.zeros(weight.rows)
        return self.checkpoint.tensor(f"{weight.name}.bias").bfloat16().float()

    def _cut_rows(self, unit: Unit, weight: Weight, keep: tuple[int, ...], precision: Precision) -> Tensor:
        """A weight with its rows cut, in the full shape; made for each cut, as its pair depends on the kept rows."""
        index = cut_channels(self.layout, unit, keep).rows[weight.name]
        runs = (Run(count=weight.cols, precision=precision),)
        path = self._path(weight, precision, keep)

        def make() -> None:
            w = self._dense(weight)[index].to(self.device)
            moments = self._there(self.moments(weight))
            (made,) = self.compressor.compress([w], moments, [weight.name], [runs], [self.rank])
            save_tensors(path, made.tensors(weight.name))

        spread = torch.zeros(weight.rows, weight.cols)
        spread[index] = Compressed.of(self._kept(path, make), weight.name, runs).dense()
        return spread

    def _cut_columns(
        self, unit: Unit, weight: Weight, keep: tuple[int, ...], precision: Precision
    ) -> dict[str, Tensor]:
        """The output weight of a cut unit: refitted if asked, compressed, and spread over the full shape."""
        index = cut_channels(self.layout, unit, keep).cols[weight.name]
        runs = (Run(count=len(index), precision=precision),)
        path = self._path(weight, precision, keep)

        def make() -> None:
            full = self.stats.moments(weight.site) if self.stats is not None else None
            kept = None if full is None else replace(full.at(index), cross=full.h[:, index], dense_mean=full.mean)
            kept, w = self._there(kept), self._dense(weight).to(self.device)
            bias = self._bias(weight).float().to(self.device) if weight.bias else None
            fitted = w[:, index]
            if self.refits:
                assert kept is not None
                fitted = refit.refit(w, fitted, bias, kept, kept, RIDGE).weight
            (made,) = self.compressor.compress([fitted], kept, [weight.name], [runs], [self.rank])
            new = self._bias(weight)
            if kept is not None and self.refits:
                new = refit.bias_for(w, made.dense().to(self.device), bias, kept)
            save_tensors(path, {**made.tensors(weight.name), "bias": new.bfloat16().float()})  # as it is stored

        tensors = self._kept(path, make)
        spread = torch.zeros(weight.rows, weight.cols)
        spread[:, index] = Compressed.of(tensors, weight.name, runs).dense()
        return {f"{weight.name}.weight": spread, f"{weight.name}.bias": tensors["bias"]}

    @staticmethod
    def _kept(path: Path, make: Callable[[], None]) -> dict[str, Tensor]:
        """The tensors of a file, which is made if it is missing or damaged."""
        if (found := load_tensors(path)) is None:
            make()
            found = load_tensors(path)
            assert found is not None, f"{path} was not made"
        return found[0]
