"""Second moments of the inputs of each site, collected block by block in one forward sweep, stored and reused.

They are H = E[x x^T] and the mean of x over the calibration tokens, summed in fp32. What is stored is the mean, the
standard deviation, and the lower triangle of the correlations in fp16 (ours): a quarter of the bytes of H, and an error
that is small beside the damping of every solve, also where a channel's mean is far larger than its deviation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimbit.calibrate.moments import Accumulator, Moments
from trimbit.calibrate.taps import Tap
from trimbit.jobs.cache import save_atomically
from trimbit.jobs.carried import Carried
from trimbit.jobs.progress import Progress
from trimbit.model.forward.stream import BlockStream, embed_chunks

BAND = 1024  # rows of a triangle that are stored together


class Stats:
    """The moments of every site of the dense model: one file per block, read on demand."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def moments(self, site: str) -> Moments:
        """The moments of a site such as `blocks.7.mlp.mid` or `head_in`."""
        with safe_open(self.folder / _file(site), framework="pt") as file:
            mean, deviation = file.get_tensor(f"{site}.mean"), file.get_tensor(f"{site}.deviation")
            h = mean.outer(mean)
            for band in _bands(len(mean)):
                part = file.get_tensor(f"{site}.correlation.{band.start}").float()
                part *= deviation[band, None] * deviation[: band.stop]
                own = part[:, band.start :].tril()
                h[band, band] += own + own.tril(-1).T
                h[band, : band.start] += part[:, : band.start]
                h[: band.start, band] += part[:, : band.start].T
        return Moments(count=self.count, h=h, mean=mean)


def _file(site: str) -> str:
    parts = site.split(".")
    return f"block-{int(parts[1]):04d}.safetensors" if parts[0] == "blocks" else f"{site}.safetensors"


def _bands(n: int) -> Iterator[slice]:
    """The rows that are stored as one tensor."""
    return (slice(at, min(at + BAND, n)) for at in range(0, n, BAND))


def collect(stream: BlockStream, tokens: Int[Tensor, "rows length"], folder: Path, progress: Progress) -> None:
    """Run the dense model over the tokens, block by block, and store the moments of every site in `folder`.

    An interrupted sweep resumes from the block it had reached.
    """
    layout, carried = stream.layout, Carried(folder)
    done, hidden = 0, embed_chunks(stream, tokens)
    if (known := carried.load()) is not None:
        done, hidden = known[0], [own.to(stream.device) for own in known[1]["hidden"]]
    for index in range(done, layout.blocks):
        block = stream.load(index)
        sites = stream.site_modules(index, block)
        sums = {site: Accumulator() for site in sites}
        for at, chunk in enumerate(hidden):
            with Tap(sites) as seen:
                hidden[at] = stream.run(index, block, chunk)
            for site, x in seen.items():
                sums[site].add(x)
        _store(folder / _file(f"blocks.{index}"), sums)
        carried.save(index + 1, {"hidden": hidden})
        progress(index + 1, layout.blocks)
    final = Accumulator()
    for chunk in hidden:
        final.add(stream.final_norm(chunk).flatten(0, -2))
    _store(folder / _file("head_in"), {"head_in": final})
    carried.finish()


def _store(path: Path, sums: Mapping[str, Accumulator]) -> None:
    tensors: dict[str, Tensor] = {}
    for site, total in sums.items():
        moments = total.moments()
        covariance = moments.h - moments.mean.outer(moments.mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        tensors |= {f"{site}.mean": moments.mean.cpu(), f"{site}.deviation": deviation.cpu()}
        safe = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        for band in _bands(len(safe)):
            part = covariance[band, : band.stop] / safe[band, None] / safe[: band.stop]
            tensors[f"{site}.correlation.{band.start}"] = part.clamp_(-1, 1).half().cpu()
    save_atomically(path, lambda temporary: save_file(tensors, temporary))
