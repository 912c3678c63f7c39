"""A transformers cache that packs keys and values, except those of the first and the last tokens.

A call reads stored tokens dequantised, and its own tokens exactly. Afterwards the tokens that are no longer recent are
quantised, once and for all. So the stored tokens do not depend on how they were split into calls, given the same keys
and values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trimbit.kernels.kv import dequantize_tokens, quantize_tokens
from trimbit.model.forward.absent import NoAttention
from trimbit.model.forward.hf_names import CACHE, OLD
from trimbit.model.sizes import check_kv_cache
from trimbit.schema.kv_cache import KVPrecision


@dataclass(kw_only=True)
class PackedTokens:
    """The stored keys, or values, of one layer."""

    sink: Float[Tensor, "batch heads first channels"]
    codes: UInt8[Tensor, "batch heads packed nbytes"]
    scales: Float[Tensor, "batch heads packed groups"]  # fp16
    minima: Float[Tensor, "batch heads packed groups"]  # fp16
    recent: Float[Tensor, "batch heads last channels"]

    @classmethod
    def empty(cls, like: Float[Tensor, "batch heads tokens channels"], precision: KVPrecision) -> "PackedTokens":
        """An empty store, with the batch size, heads and channels of `like`."""
        batch, heads, _, channels = like.shape
        grid = like.new_empty(batch, heads, 0, precision.n_groups(channels), dtype=torch.float16)
        codes = like.new_empty(batch, heads, 0, precision.code_nbytes(channels), dtype=torch.uint8)
        exact = like.new_empty(batch, heads, 0, channels)
        return cls(sink=exact, codes=codes, scales=grid, minima=grid, recent=exact)

    def append(
        self, new: Float[Tensor, "batch heads new channels"], precision: KVPrecision
    ) -> Float[Tensor, "batch heads tokens channels"]:
        """Store new tokens; returns all tokens, as this call reads them."""
        read = torch.cat([self.sink, *self._unpacked(new, precision), self.recent, new], dim=2)
        exact = torch.cat([self.recent, new], dim=2)
        first = min(precision.sink_tokens - self.sink.shape[2], exact.shape[2])
        if first > 0:
            self.sink = torch.cat([self.sink, exact[:, :, :first]], dim=2)
            exact = exact[:, :, first:]
        leaving = max(exact.shape[2] - precision.recent_tokens, 0)
        if leaving:
            parts = quantize_tokens(exact[:, :, :leaving], precision)
            self.codes, self.scales, self.minima = (
                torch.cat([old, part], dim=2)
                for old, part in zip((self.codes, self.scales, self.minima), parts, strict=True)
            )
        self.recent = exact[:, :, leaving:].clone()  # a view would keep the whole prompt in memory
        return read

    def _unpacked(self, new: Tensor, precision: KVPrecision) -> list[Tensor]:
        if not self.codes.shape[2]:
            return []
        return [dequantize_tokens(self.codes, self.scales, self.minima, precision, new.shape[3], new.dtype)]

    def tensors(self) -> Iterator[Tensor]:
        """All stored tensors."""
        return (getattr(self, part.name) for part in fields(self))

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch's rows to all tensors."""
        for part in fields(self):
            setattr(self, part.name, change(getattr(self, part.name)))


class CountingLayer(DynamicLayer):
    """The cache of a layer whose attention was dropped: counts tokens and stores nothing."""

    is_croppable = False
    supports_early_init = False  # the batch size is known only at the first call

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = 0
        self.stored: tuple[PackedTokens, ...] = ()  # keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Count the tokens."""
        self.is_initialized = True
        self.tokens += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens, self.stored, self.is_initialized = 0, (), False

    def crop(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Not supported: quantised tokens cannot become exact again."""
        raise NotImplementedError(
            "a packed cache cannot remove tokens; generate without an assistant model, "
            'or with an exact cache (cache_implementation="dynamic")'
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._rearrange(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._rearrange(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._rearrange(lambda part: part[indices])

    def _rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        for half in self.stored:
            half.rearrange(change)


class PackedLayer(CountingLayer):
    """The packed keys and values of one layer with full attention."""

    def __init__(self, precision: KVPrecision) -> None:
        super().__init__()
        self.precision = precision

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Store new tokens; returns the keys and values of all tokens, as this call reads them."""
        if not self.is_initialized:
            self.stored = tuple(PackedTokens.empty(new, self.precision) for new in (key_states, value_states))
        super().update(key_states, value_states)
        keys, values = self.stored
        return keys.append(key_states, self.precision), values.append(value_states, self.precision)


class PackedCache(Cache):
    """A cache for one model; layers with a sliding window, which drop old tokens anyway, are not quantised.

    The first tokens are the first columns of a batch. In a row with left padding, these are padding, and the row's own
    first tokens are quantised.

    Raises:
        PlanError: if a group is longer than a head, or no layer has full attention.
    """

    def __init__(self, model: PreTrainedModel, precision: KVPrecision) -> None:
        check_kv_cache(precision, model.config)
        dropped = {module.layer_idx for module in model.modules() if isinstance(module, NoAttention)}
        layers: list[Any] = DynamicCache(config=model.config).layers
        for index, layer in enumerate(layers):
            if index in dropped:
                layers[index] = CountingLayer()
            elif not layer.is_sliding:
                layers[index] = PackedLayer(precision)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors stored now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors stored now."""
        layer: Any
        for layer in self.layers:
            if isinstance(layer, CountingLayer):
                for half in layer.stored:
                    yield from half.tensors()
            elif layer.is_initialized:
                yield from (layer.keys, layer.values)


def precision_of(model: PreTrainedModel) -> KVPrecision | None:
    """The format of a model's KV cache; None: keys and values are not quantised."""
    return getattr(model, "trimbit_kv_cache", None)


def cache_for(model: PreTrainedModel) -> Cache:
    """An empty cache for a model: packed if its plan asks for it, otherwise exact."""
    precision = precision_of(model)
    return DynamicCache(config=model.config) if precision is None else PackedCache(model, precision)


def pack_cache(model: PreTrainedModel, precision: KVPrecision) -> None:
    """Make `model.generate` use a packed cache, unless the caller asks for another cache or for none.

    Raises:
        PlanError: if the format does not fit the model.
    """
    check_kv_cache(precision, model.config)
    model.trimbit_kv_cache = precision  # type: ignore[assignment] # neither a tensor nor a module
    model.generate = MethodType(_generate, model)  # type: ignore[assignment]


def _generate(
    model: Any,  # noqa: ANN401
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    def told(name: str) -> Any:  # noqa: ANN401
        given = (kwargs.get(name), getattr(generation_config, name, None), getattr(model.generation_config, name))
        return next((value for value in given if value is not None), None)

    kind = told("cache_implementation")
    exact = kind not in {None, "hybrid"}  # in Gemma's files; transformers ignores it
    given = any(kwargs.get(name) is not None for name in (CACHE, OLD))
    if not given and told("use_cache") is not False and not exact:
        kwargs[CACHE] = cache_for(model)
    return type(model).generate(model, inputs, generation_config, *args, **kwargs)
