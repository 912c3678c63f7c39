"""Matrix products in a given dtype, as fast as the CPU's instructions allow.

On CPUs without bf16 instructions, PyTorch multiplies bf16 matrices several times slower than fp32 matrices. There
the product is computed in fp32 and rounded to bf16: the same product, summed in another order.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trimbit.errors import RecipeError

log = logging.getLogger(__name__)
_ATEN = torch.ops.aten
_PRODUCTS = {
    *(getattr(_ATEN, name).default for name in ("mm", "addmm", "bmm", "baddbmm")),
    *(_ATEN.linear.default, _ATEN.matmul.default),  # decomposed before dispatch, except in inference mode
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,  # its forward pass is as fast in bf16
}


def fastest_device(nbytes: int = 0, gpu: torch.device | None = None) -> torch.device:
    """The GPU if there is one with `nbytes` of free memory, else the CPU; warns if the GPU has less."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = gpu or torch.device("cuda")
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < nbytes:
        log.warning(
            "the GPU has %.1f GB of free memory, but about %.1f GB are needed; "
            "falling back to the CPU, which is much slower",
            free / 1e9, nbytes / 1e9,
        )  # fmt: skip
        return torch.device("cpu")
    return gpu


def named_device(name: str, nbytes: int) -> torch.device:
    """The device of a name such as `cpu` or `cuda:1`; `auto` is the fastest that has `nbytes` of free memory.

    Raises:
        RecipeError: if it is not there, or has less free memory.
    """
    if name == "auto":
        return fastest_device(nbytes)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise RecipeError(f"device {name!r} is not there: use auto, cpu, cuda or cuda:1 ({err})") from err
    if device.type == "cuda" and (free := torch.cuda.mem_get_info(device)[0]) < nbytes:
        raise RecipeError(
            f"{name} has {free / 1e9:.1f} GB of free memory, but about {nbytes / 1e9:.1f} GB are needed; "
            "use --device cpu"
        )
    return device


def finished(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def computing(compute: torch.dtype, device: str = "cpu") -> Iterator[None]:
    """Compute without gradients, with matrix products in `compute`."""
    with torch.no_grad(), products_in(compute, device):
        yield


@contextmanager
def products_in(compute: torch.dtype, device: str = "cpu") -> Iterator[None]:
    """Compute matrix products in `compute`, including those of a backward pass inside the context."""
    cast = torch.autocast(device, dtype=torch.bfloat16, enabled=compute is torch.bfloat16, cache_enabled=False)
    with cast, fast_bf16() if device == "cpu" and compute is torch.bfloat16 else nullcontext():
        yield


def native(compute: torch.dtype, device: str) -> torch.dtype:
    """The dtype for matrices that are multiplied often: fp32 instead of bf16 on a CPU without bf16 instructions."""
    return torch.float32 if compute is torch.bfloat16 and device == "cpu" and _without_bf16() else compute


def _without_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def fast_bf16() -> AbstractContextManager[Any]:
    """Multiply bf16 matrices the fastest way on this CPU."""
    if _without_bf16():
        return RoundedProducts()  # type: ignore[no-untyped-call]
    return nullcontext()


class RoundedProducts(TorchDispatchMode):
    """Multiply bf16 matrices on the CPU in fp32, and round the product to bf16."""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run one operation."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not all(_is_bf16(one) for one in args[:2]):
            return func(*args, **kwargs)
        found = func(*(one.float() if isinstance(one, Tensor) else one for one in args), **kwargs)
        return tree_map_only(Tensor, Tensor.bfloat16, found)


def _is_bf16(one: Tensor) -> bool:
    return one.dtype is torch.bfloat16 and one.device.type == "cpu"
