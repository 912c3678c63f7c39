"""The weights of every choice, made from the dense model's statistics and kept on disk, to measure and to try plans.

A candidate has the full shape: what is cut is zero, which computes the same as being gone.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimbit.apply import Method, identity_moments, tied_moments
from trimbit.measure import menu_of, sites_of
from trimbit.measurements import Space
from trimbit.model import axes
from trimbit.model.checkpoint import Checkpoint
from trimbit.model.layout import Layout, Unit, Weight
from trimbit.plan import digest
from trimbit.precision import Precision, Run
from trimbit.quant.qtensor import QTensor
from trimbit.repair import refit
from trimbit.stats import Moments, Stats

RIDGE = refit.Config(ridges=(0.01,))  # ours; there are no held-out moments here


class CandidateWeights:
    """Quantised and refitted weights by unit, width and format; each quantised weight is made once."""

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, stats: Stats | None, method: Method, folder: Path,
        rankings: Mapping[str, tuple[int, ...]], space: Space | None,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.layout = layout
        self.stats = stats
        self.method = method
        self.folder = folder
        self.rankings = rankings
        self.space = space

    def unit_state(self, unit: Unit, width: int | None, formats: Mapping[str, Precision]) -> dict[str, Tensor]:
        """Parameters of a unit by name, each site's weights in its format; a zero bias where nothing is cut."""
        state: dict[str, Tensor] = {}
        cut = unit.dim is not None and width is not None and width != unit.size
        for site, names in sites_of(self.layout, unit).items():
            for name in names:
                weight = self.layout.weights[name]
                if name != unit.out_weight:
                    state[f"{name}.weight"] = self.quantised(weight, formats[site]).dequantize(torch.bfloat16)
                elif cut and width == 0:
                    state |= {
                        f"{name}.weight": torch.zeros(weight.rows, weight.cols),
                        f"{name}.bias": torch.zeros(weight.rows),
                    }
                elif cut:
                    state |= self._cut(unit, weight, width or 0, formats[site])
                else:
                    state[f"{name}.weight"] = self.quantised(weight, formats[site]).dequantize(torch.bfloat16)
                    state[f"{name}.bias"] = self._bias(weight)
        return state

    def moments(self, weight: Weight) -> Moments | None:
        """What the quantiser is given for a weight."""
        if self.stats is None:
            return None
        if weight.unit == "embed":
            return tied_moments(self.stats.moments("head_in")) if self.layout.tied else identity_moments(weight.cols)
        return self.stats.moments(weight.site)

    def quantised(self, weight: Weight, precision: Precision) -> QTensor:
        """The whole weight in one format."""
        path = self._path(weight, precision)
        if not path.exists():
            self._make(weight, precision)
        return _stored(path, (Run(count=weight.cols, precision=precision),))[0]

    def _path(self, weight: Weight, precision: Precision) -> Path:
        return self.folder / f"{weight.name}.{precision.name}.safetensors"

    def _make(self, weight: Weight, precision: Precision) -> None:
        """Quantise all weights of a site in all formats of the menu at once: they share the input and its factor."""
        unit = self.layout.units[weight.unit]
        members = [self.layout.weights[name] for name in unit.weights if self.layout.weights[name].site == weight.site]
        menu = dict.fromkeys((precision, *(menu_of(unit, self.space) if self.space and unit.block is not None else ())))
        work = [(member, p) for member in members for p in menu if not self._path(member, p).exists()]
        dense = {member.name: self._dense(member) for member in members}
        runs = [(Run(count=member.cols, precision=p),) for member, p in work]
        packed = self.method.quantize_all([dense[m.name] for m, _ in work], self.moments(weight), weight.name, runs)
        for (member, p), one in zip(work, packed, strict=True):
            _store(self._path(member, p), one, {})

    def _dense(self, weight: Weight) -> Tensor:
        return self.checkpoint.tensor(f"{weight.name}.weight").float()

    def _bias(self, weight: Weight) -> Tensor:
        return self.checkpoint.tensor(f"{weight.name}.bias") if weight.bias else torch.zeros(weight.rows)

    def _cut(self, unit: Unit, weight: Weight, width: int, precision: Precision) -> dict[str, Tensor]:
        """The output weight of a cut unit: refitted, quantised, and spread over the full shape."""
        assert self.stats is not None
        assert unit.dim is not None
        keep = sorted(self.rankings[unit.dim][:width])
        index = axes.kept_indices(weight.col_axis, self.layout.sizes, unit.dim.rsplit(".", 1)[1], keep)
        runs = (Run(count=len(index), precision=precision),)
        path = self.folder / f"{weight.name}.{width}.{precision.name}.{digest(keep)}.safetensors"
        if not path.exists():
            w, full = self._dense(weight), self.stats.moments(weight.site)
            kept = replace(full.at(index), cross=full.h[:, index], dense_mean=full.mean)
            bias = self._bias(weight).float() if weight.bias else None
            fitted = refit.refit(w, w[:, index], bias, kept, kept, RIDGE)
            packed = self.method.quantize(fitted.weight, kept, weight.name, runs)
            _store(path, packed, {"bias": refit.bias_for(w, packed.dequantize(), bias, kept)})
        packed, more = _stored(path, runs)
        spread = torch.zeros(weight.rows, weight.cols)
        spread[:, index] = packed.dequantize()
        return {f"{weight.name}.weight": spread, f"{weight.name}.bias": more["bias"]}


def _store(path: Path, packed: QTensor, more: dict[str, Tensor]) -> None:
    zeros = {} if packed.zeros is None else {"zeros": packed.zeros}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"codes": packed.codes, "scales": packed.scales, **zeros, **more}, beside)
    beside.replace(path)


def _stored(path: Path, runs: tuple[Run, ...]) -> tuple[QTensor, dict[str, Tensor]]:
    tensors = load_file(path)
    packed = QTensor(
        codes=tensors.pop("codes"), scales=tensors.pop("scales"), zeros=tensors.pop("zeros", None), runs=runs
    )
    return packed, tensors
