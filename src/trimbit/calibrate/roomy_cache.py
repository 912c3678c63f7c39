"""A KV cache with room for more tokens, so that a new token copies nothing of those before it.

Appending by concatenation copies the whole cache at every step, and leaves holes in memory that no later step fills.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens, at least; doubled whenever it is used up


def roomy_cache() -> Cache:
    """An empty cache."""
    return Cache(layer_class_to_replicate=RoomyLayer)


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer: views of the beginnings of larger tensors."""

    def update(
        self, key_states: Float[Tensor, "rows heads new d"], value_states: Float[Tensor, "rows heads new dv"],
        *_: Any, **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Append keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [torch.empty_like(new[:, :, :0]) for new in (key_states, value_states)]
            self.keys, self.values = self._room
        known = self.get_seq_length()
        self.keys, self.values = (self._appended(at, known, new) for at, new in enumerate((key_states, value_states)))
        return self.keys, self.values

    def _appended(self, at: int, known: int, new: Tensor) -> Tensor:
        count, room = known + new.shape[2], self._room[at]
        if count > room.shape[2]:
            larger = new.new_empty(*new.shape[:2], max(ROOM, 2 * count), new.shape[3])
            larger[:, :, :known] = room[:, :, :known]
            self._room[at] = room = larger
        room[:, :, known:count] = new
        return room[:, :, :count]
