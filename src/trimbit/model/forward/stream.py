"""A causal LM run one block at a time: only the embedding and the final norm stay loaded.

Hidden states are fp32; matrix products run in `compute` (bfloat16 by default) under autocast, so that the residual
stream keeps its precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.checkpoint.open import materialize
from trimbit.model.forward.compute import computing
from trimbit.model.forward.logits import Head, head_of
from trimbit.model.layout import Layout
from trimbit.schema.plan import Rotation

CPU = torch.device("cpu")
CHUNK_TOKENS = 2048  # tokens run at a time, to bound the memory of activations
Chunks = list[Float[Tensor, "_ length hidden"]]  # the last may have fewer rows


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config with its parameters on the meta device; computed buffers (such as RoPE's) are real.

    Attention is sdpa if the family supports it; Gemma 2 runs eager. Buffers are those of a transformers model of this
    dtype, which rounds Gemma's factor on the embedding.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
        if names:
            model._init_weights(module)
    model.eval()
    return model


class _Recorder(nn.Module):
    """Replaces a block, and records the arguments of its call."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if args:
            raise TypeError("a block was called with positional arguments other than the hidden states")
        self.kwargs = kwargs
        return hidden


def block_arguments(model: PreTrainedModel, rows: int, length: int) -> list[dict[str, Any]]:
    """The arguments (mask, rotary embeddings, positions) of each block, for model inputs of this shape."""
    decoder = model.get_decoder()
    blocks = decoder.layers
    device = next((buffer.device for buffer in decoder.buffers(recurse=True) if not buffer.is_meta), None)  # RoPE's
    recorders = nn.ModuleList(_Recorder(block) for block in blocks)
    try:
        decoder.layers = recorders
        with torch.no_grad():
            decoder(inputs_embeds=torch.zeros(rows, length, model.config.hidden_size, device=device), use_cache=False)
    finally:
        decoder.layers = blocks
    return [recorder.kwargs for recorder in recorders]  # type: ignore[misc]


def run_block(
    block: nn.Module, arguments: dict[str, Any], hidden: Float[Tensor, "rows length hidden"]
) -> Float[Tensor, "rows length hidden"]:
    """A block's output in fp32; `arguments` are those of this block, from `block_arguments`."""
    out = block(hidden, **arguments)
    return (out[0] if isinstance(out, tuple) else out).float()  # type: ignore[no-any-return]


class BlockStream:
    """The dense model of a checkpoint, one block at a time."""

    rotation: Rotation | None = None  # the basis of its channels

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, compute: torch.dtype = torch.bfloat16,
        device: torch.device = CPU,
    ) -> None:  # fmt: skip
        """`device` holds the embedding, the final norm and the loaded blocks."""
        self.checkpoint = checkpoint
        self.layout = layout
        self.compute = compute
        self.device = device
        self.skeleton = build_skeleton(checkpoint.config, compute)
        family = layout.family
        self._embed = self.skeleton.get_submodule(family.embed)
        self.norm = self.skeleton.get_submodule(family.final_norm)
        materialize(self._embed, checkpoint, family.embed + ".", torch.bfloat16)
        materialize(self.norm, checkpoint, family.final_norm + ".", torch.float32)
        self._embed.to(device)
        self.norm.to(device)
        for module in self.skeleton.modules():  # RoPE's
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self._arguments: dict[tuple[int, int, torch.device], list[dict[str, Any]]] = {}

    def embed(self, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length hidden"]:
        """The input of the first block, in fp32."""
        with torch.no_grad():
            return self._embed(tokens.to(self.device)).float()  # type: ignore[no-any-return]

    @contextmanager
    def embedding_replaced(self, table: Float[Tensor, "vocab hidden"]) -> Iterator[None]:
        """Use another embedding table inside the context."""
        original = self._embed.weight
        self._embed.weight = nn.Parameter(table.to(self.device), requires_grad=False)
        try:
            yield
        finally:
            self._embed.weight = original

    def final_norm(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """The input of the head."""
        with torch.no_grad():
            return self.norm(hidden)  # type: ignore[no-any-return]

    def head(self) -> Head:
        """The dense head, in the dtype of matrix products."""
        return head_of(self.head_weight(self.device))

    def head_weight(self, device: torch.device) -> Float[Tensor, "vocab hidden"]:
        """The weight of the dense head, in the dtype of matrix products."""
        name = self.layout.family.embed if self.layout.tied else self.layout.family.head
        return self.checkpoint.tensor(f"{name}.weight").to(device, self.compute)

    def load(self, index: int) -> nn.Module:
        """A new copy of a block, with its weights in fp32."""
        prefix = f"{self.layout.family.blocks}.{index}"
        block = type(self.skeleton.get_submodule(prefix))
        with torch.device("meta"):
            fresh = block(self.skeleton.config, index)
        materialize(fresh, self.checkpoint, prefix + ".", torch.float32)
        self.go_online(fresh, prefix + ".")
        return fresh.eval().to(self.device)

    def go_online(self, root: nn.Module, prefix: str = "") -> None:
        """Install the online part of the model's rotation in a module with its weights; without a rotation, do nothing.

        `prefix` is removed from the model's names.
        """

    def run(
        self, index: int, block: nn.Module, hidden: Float[Tensor, "rows length hidden"]
    ) -> Float[Tensor, "rows length hidden"]:
        """One block's output, without gradients; block, which may be compressed, and hidden states share a device."""
        with computing(self.compute, hidden.device.type):
            return self.forward(index, block, hidden)

    def forward(
        self, index: int, block: nn.Module, hidden: Float[Tensor, "rows length hidden"]
    ) -> Float[Tensor, "rows length hidden"]:
        """One block's output; gradients and the dtype of products are set by the caller."""
        rows, length, _ = hidden.shape
        key = (rows, length, hidden.device)
        if key not in self._arguments:
            made = block_arguments(self.skeleton, rows, length)
            moved: dict[int, Tensor] = {}  # blocks share their arguments
            self._arguments[key] = tree_map_only(
                Tensor, lambda own: moved.setdefault(id(own), own.to(hidden.device)), made
            )
        return run_block(block, self._arguments[key][index], hidden)

    def site_modules(self, index: int, block: nn.Module) -> dict[str, nn.Module]:
        """A module that reads each site of a block, for sites that still exist."""
        prefix = f"{self.layout.family.blocks}.{index}."
        modules: dict[str, nn.Module] = {}
        existing = dict(block.named_modules())
        for weight in self.layout.weights.values():
            relative = weight.name.removeprefix(prefix)
            if weight.name.startswith(prefix) and relative in existing:
                modules.setdefault(weight.site, existing[relative])
        return modules


def embed_chunks(stream: BlockStream, tokens: Int[Tensor, "rows length"]) -> Chunks:
    """Embed rows of tokens in chunks of about `CHUNK_TOKENS`."""
    rows = max(1, CHUNK_TOKENS // tokens.shape[1])
    return [stream.embed(part) for part in tokens.split(rows)]
