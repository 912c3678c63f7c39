"""A device that is not there: its tensors compute on the CPU, and refuse to meet tensors that are not on it.

A constant or a file's tensor that was left on the CPU fails here as it would on a GPU, and results can be compared.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"


class _Module(_DummyBackendModule):
    """Not there for those who look for an accelerator: transformers, PEFT and `fork_rng` do."""

    def is_available(self):
        return False

    def device_count(self):
        return 0

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return False

    def has_primary_context(self, _index):
        return False

    def is_built(self):
        return True


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
DEVICE = torch.device(NAME, 0)
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # does nothing there; see `_cast`
_ATEN = torch.ops.aten
PRODUCTS = {getattr(_ATEN, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}
COPIES = {_ATEN.copy_.default}  # from one device to another
INDEXED = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default}  # indices may be on the CPU


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met."""


class OnDevice(torch.Tensor):
    """A tensor on the device; the values are those of `held`."""

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        self.held = held
        return self

    def __repr__(self):
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist:
            return args[0].held.tolist()
        if func is torch.Tensor.numpy:
            raise TypeError(f"a tensor on {NAME} has no numpy array; use Tensor.cpu()")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Within it the device exists."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    on_device = [isinstance(one, OnDevice) for one in tensors]
    if any(on_device) and func not in COPIES:
        first = 1 if func in INDEXED and on_device[0] else 0
        others = [] if first else [t for t, own in zip(tensors, on_device, strict=True) if not own and t.dim() > 0]
        if others:
            raise MixedDevicesError(f"{func}: a tensor of shape {tuple(others[0].shape)} is on the CPU, others are not")
    target = kwargs.get("device") or next((one for one in args if isinstance(one, torch.device)), None)
    on = any(on_device) if target is None else torch.device(target).type == NAME
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda one: one.held, (args, kwargs))
    if "device" in inner_kwargs:
        inner_kwargs = inner_kwargs | {"device": torch.device("cpu")}
    inner_args = [torch.device("cpu") if isinstance(one, torch.device) else one for one in inner_args]
    if func in PRODUCTS:
        inner_args = _cast(inner_args)
    out = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and isinstance(out, torch.Tensor) and tensors and out is _held(args[0]):
        return args[0]
    return (
        tree_map_only(torch.Tensor, lambda one: one if isinstance(one, OnDevice) else OnDevice(one), out) if on else out
    )


def _cast(args):
    """Factors of several dtypes in the narrowest, as autocast has them."""
    dtypes = {one.dtype for one in args if isinstance(one, torch.Tensor)}
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    return tree_map_only(torch.Tensor, lambda one: one.to(narrowest), args)


def _held(one):
    return one.held if isinstance(one, OnDevice) else one
