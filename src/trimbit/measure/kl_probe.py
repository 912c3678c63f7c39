"""KL of the model in memory to the original, run on from the first block that changed."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.model.forward.compute import computing
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.model.forward.logits import Divergence, Head, compare_logits, following, head_of, log_softmax, logit_slices
from trimbit.model.forward.stream import Chunks, block_arguments, run_block


class KLProbe:
    """KL(dense || model) on fixed tokens, in nats a token; made while the model is still dense.

    For many changes of one block each (`repeated`) it keeps the hidden states before each block, so that a change in
    block i costs only the blocks from i on, and the dense log-probabilities, in fp16 (their rounding adds less than
    1e-5 nats). For few whole plans it keeps the last hidden states and the dense head instead, which is far less.
    """

    def __init__(self, whole: InMemoryModel, tokens: Int[Tensor, "rows length"], *, repeated: bool = True) -> None:
        self.whole = whole
        self.tokens = tokens.to(whole.device)
        self.arguments = block_arguments(whole.model, *tokens.shape)
        self.before: Chunks = []
        self.head: Head = whole.model.get_output_embeddings()
        self.stored: list[Tensor] | None = None
        self.final = self._final(self.refresh() if repeated else self._run(self._embedded(), 0))
        if repeated:
            with computing(whole.compute, whole.device.type):
                logits = self._logits(self.final, self.head)
                self.stored = [log_softmax(own).to(torch.float16) for _, own in logits]
        else:
            self.head = head_of(whole.model.get_output_embeddings().weight.detach().clone())

    def refresh(self) -> Float[Tensor, "rows length hidden"]:
        """Take the model as it is now for what lies before a change; returns the last hidden states."""
        self.before = []
        return self._run(self._embedded(), 0, keep=True)

    def _embedded(self) -> Tensor:
        with torch.no_grad():
            return self.whole.model.get_input_embeddings()(self.tokens).float()  # type: ignore[no-any-return]

    def _run(self, hidden: Tensor, start: int, *, keep: bool = False) -> Tensor:
        with computing(self.whole.compute, self.whole.device.type):
            for index in range(start, len(self.whole.blocks)):
                if keep:
                    self.before.append(hidden)
                hidden = run_block(self.whole.blocks[index], self.arguments[index], hidden)
        return hidden

    def _final(self, hidden: Tensor) -> Tensor:
        with computing(self.whole.compute, self.whole.device.type):
            norm = self.whole.model.get_submodule(self.whole.layout.family.final_norm)
            return norm(hidden).flatten(0, -2)  # type: ignore[no-any-return]

    def _logits(self, final: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
        return logit_slices(head, self.whole.model.config, final)

    def _reference(self) -> Iterator[Tensor]:
        if self.stored is not None:
            yield from (log_p.float() for log_p in self.stored)
        else:
            yield from (log_softmax(logits) for _, logits in self._logits(self.final, self.head))

    def divergence(self, start: int | None = None) -> Divergence:
        """The model as it is now; nothing before block `start` changed since `refresh` (None: anything may)."""
        hidden = self._run(self._embedded(), 0) if start is None else self._run(self.before[start], start)
        logits = self._logits(self._final(hidden), self.whole.model.get_output_embeddings())
        with computing(self.whole.compute, self.whole.device.type):
            return compare_logits(self._reference(), logits, following(self.tokens))

    def damage(self, start: int | None) -> float:
        """The KL of `divergence`."""
        return self.divergence(start).kl
