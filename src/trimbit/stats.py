"""Statistics of the inputs of each site, collected block by block in one sweep, stored, and reused.

H = E[x x^T] and the mean of x, over the calibration tokens, in fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimbit.cache import save_whole
from trimbit.model.stream import BlockStream, embed_chunks
from trimbit.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of a site's inputs x [n], and of the same site's inputs in the dense model, x_dense [m].

    h = E[x x^T], mean = E[x]; cross = E[x_dense x^T] and dense_mean = E[x_dense] where both paths were run.
    """

    count: int
    h: Float[Tensor, "n n"]
    mean: Float[Tensor, " n"]
    cross: Float[Tensor, "m n"] | None = None
    dense_mean: Float[Tensor, " m"] | None = None

    def at(self, index: Int[Tensor, " k"]) -> "Moments":
        """The moments of the channels `index` of x."""
        return replace(
            self,
            h=self.h[index][:, index],
            mean=self.mean[index],
            cross=None if self.cross is None else self.cross[:, index],
        )


class Accumulator:
    """Sums moments over chunks of tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Float[Tensor, "tokens n"], dense: Float[Tensor, "tokens m"] | None = None) -> None:
        """Add the inputs of some tokens, rounded to bf16 as a bf16 layer reads them, whatever the model computes in."""
        self.count += x.shape[0]
        x = x.float()
        self._sum("h", lambda: torch.zeros(x.shape[1], x.shape[1])).add_(product(x, x))
        self._sum("mean", lambda: torch.zeros(x.shape[1])).add_(x.sum(0))
        if dense is not None:
            dense = dense.float()
            self._sum("cross", lambda: torch.zeros(dense.shape[1], x.shape[1])).add_(product(dense, x))
            self._sum("dense_mean", lambda: torch.zeros(dense.shape[1])).add_(dense.sum(0))

    def _sum(self, name: str, zero: Callable[[], Tensor]) -> Tensor:
        if name not in self.sums:
            self.sums[name] = zero()
        return self.sums[name]

    def moments(self) -> Moments:
        """The means so far."""
        return Moments(count=self.count, **{name: total / self.count for name, total in self.sums.items()})

    def plus(self, other: "Accumulator") -> "Accumulator":
        """The sum of two accumulators of the same site."""
        total = Accumulator()
        total.count = self.count + other.count
        total.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return total


def product(x: Float[Tensor, "tokens n"], y: Float[Tensor, "tokens m"]) -> Float[Tensor, "n m"]:
    """x^T y with bf16 factors summed in fp32: exact for what a bf16 layer reads, at several times the speed of fp32."""
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # made at run time
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        return x.T @ y
    finally:
        backend.fp32_precision = before


class StopForwardError(Exception):
    """Ends a block's forward once the site that was asked for has been seen."""


class Tap:
    """Sees the input of some modules while a block runs: `with Tap({"o_in": module}) as seen: ...; seen["o_in"]`."""

    def __init__(self, modules: Mapping[str, nn.Module], *, stop_at: str | None = None) -> None:
        self.modules = modules
        self.stop_at = stop_at
        self.seen: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        self.handles = [m.register_forward_pre_hook(self._hook(site)) for site, m in self.modules.items()]
        return self.seen

    def _hook(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.seen[site] = args[0].detach().flatten(0, -2)
            if site == self.stop_at:
                raise StopForwardError

        return see

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for handle in self.handles:
            handle.remove()
        return kind is StopForwardError


class Stats:
    """The moments of every site of the dense model, one file a block, read when asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def moments(self, site: str) -> Moments:
        """The moments of a site such as `blocks.7.mlp.mid` or `head_in`."""
        with safe_open(self.folder / _file(site), framework="pt") as file:
            return Moments(count=self.count, h=file.get_tensor(f"{site}.h"), mean=file.get_tensor(f"{site}.mean"))


def _file(site: str) -> str:
    parts = site.split(".")
    return f"block-{int(parts[1]):04d}.safetensors" if parts[0] == "blocks" else f"{site}.safetensors"


def _files(blocks: int) -> list[str]:
    return [_file(f"blocks.{index}") for index in range(blocks)] + [_file("head_in")]


def stored(folder: Path, blocks: int, count: int) -> Stats | None:
    """The statistics under `folder`, if a sweep over `count` tokens has finished there."""
    return Stats(folder, count) if all((folder / name).exists() for name in _files(blocks)) else None


def collect(stream: BlockStream, tokens: Int[Tensor, "rows length"], folder: Path, progress: Progress) -> Stats:
    """Run the dense model over the tokens block by block and store the moments of every site under `folder`.

    Each file appears whole or not at all; the last one is the head's, so that its presence means all are there.
    """
    layout = stream.layout
    files = _files(layout.blocks)
    folder.mkdir(parents=True, exist_ok=True)
    hidden = embed_chunks(stream, tokens)
    for index in range(layout.blocks):
        block = stream.load(index)
        sites = stream.site_modules(index, block)
        sums = {site: Accumulator() for site in sites}
        for at, chunk in enumerate(hidden):
            with Tap(sites) as seen:
                hidden[at] = stream.run(index, block, chunk)
            for site, x in seen.items():
                sums[site].add(x)
        _store(folder / files[index], sums)
        progress(index + 1, layout.blocks)
    final = Accumulator()
    for chunk in hidden:
        final.add(stream.final_norm(chunk).flatten(0, -2))
    _store(folder / files[-1], {"head_in": final})
    return Stats(folder, tokens.numel())


def _store(path: Path, sums: Mapping[str, Accumulator]) -> None:
    tensors: dict[str, Tensor] = {}
    for site, total in sums.items():
        moments = total.moments()
        tensors |= {f"{site}.h": moments.h, f"{site}.mean": moments.mean}
    save_whole(path, lambda beside: save_file(tensors, beside))
