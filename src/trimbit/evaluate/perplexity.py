"""Perplexity, KL and agreement with the original on a text, with bytes, memory and speed."""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from trimbit.artifact.files import PLAN_FILE, held_nbytes, is_compressed, weight_nbytes
from trimbit.calibrate.text import evaluation_windows
from trimbit.errors import ArtifactError, DataError, NumericsError
from trimbit.evaluate.speed import decode_speed
from trimbit.jobs.hardware import hardware, peak_nbytes
from trimbit.jobs.progress import Progress, silent
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.compute import fast_bf16, finished, named_device
from trimbit.model.forward.hf_names import CACHE
from trimbit.model.forward.logits import kl, log_softmax, logit_slices
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.runtime.kv_cache import cache_for, precision_of
from trimbit.runtime.load import load_model, load_tokenizer
from trimbit.schema.evaluation import Evaluation
from trimbit.schema.plan import load_plan

log = logging.getLogger(__name__)
READ_TOKENS = 32  # ours: half of the default `recent_tokens`
READ_WINDOWS = 8  # ours: windows read together, because every read dequantises all weights


def evaluate(
    path: str | Path, text: str | Path, *, context: int = 2048, max_windows: int | None = None,
    against: str | Path | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "auto",
    progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Measure perplexity, bytes, memory and speed on a text; with `against`, KL and agreement with the original.

    Args:
        path: an original model or a compressed directory.
        text: a .txt, .md, .raw or .jsonl file, each also with .gz.
        context: tokens per window; windows do not overlap.
        max_windows: number of windows, from the start; None: all.
        against: the original model.
        dtype: in which the model is loaded, bfloat16 or float32.
        device: where it runs: auto, cpu, cuda or cuda:1.
        progress: takes (windows done, all windows).

    Raises:
        ArtifactError: if `against` is not an original model, or has another vocabulary.
        DataError: if the text is too short, or the model cannot read windows of this length.
        NumericsError: if a logit is not finite.
    """
    path, text, against = Path(path), Path(text), Path(against) if against is not None else None
    tokenizer = load_tokenizer(path)
    windows = evaluation_windows(text, tokenizer, context=context, max_windows=max_windows)
    config = _config(path)
    positions = getattr(config, "max_position_embeddings", context)
    if not 2 <= context <= positions:
        raise DataError(f"the context is {context} tokens, but this model takes 2 to {positions}; change --context")
    if against is not None:
        _require_original(path, config.vocab_size, against)
    where = named_device(device, sum(map(held_nbytes, (path, against) if against else (path,))))
    model = load_model(path, dtype, where)
    precision = precision_of(model)
    widths = load_plan(path / PLAN_FILE).widths if is_compressed(path) else {}
    reference, peak = None, 0
    totals, seconds = torch.zeros(3, dtype=torch.float64), 0.0
    together = READ_WINDOWS if precision is not None else 1
    for at in (0, *range(1, len(windows), together)):
        part = windows[at : at + together] if at else windows[:1]
        started = time.perf_counter()
        hidden = read_hidden(model, part)
        finished(where)
        seconds += time.perf_counter() - started
        if at == 0:  # after one window, before the original is loaded
            peak = peak_nbytes()
            reference = load_model(against, dtype, where) if against is not None else None
        for window, own in zip(part, hidden, strict=True):
            beside = (reference, final_hidden(reference, window)) if reference is not None else None
            totals += score(model, own, window, beside)
        progress(at + len(part), len(windows))
    nbytes, scored = weight_nbytes(path), windows.shape[0] * (context - 1)
    nll, kl, top1 = (totals / scored).tolist()
    parameters = sum(p.numel() for p in reference.parameters()) if reference is not None else None
    return Evaluation(
        model=str(path), against=str(against) if against else None, text=text.name, context=context,
        windows=len(windows), tokens=scored,
        ppl=math.exp(nll), kl=kl if reference else None, top1_agreement=top1 if reference else None,
        kv_cache=precision, kv_cache_nbytes=cache_nbytes(model.config, widths, precision, context),
        kv_cache_bf16_nbytes=cache_nbytes(model.config, widths, None, context),
        weight_nbytes=nbytes, bits_per_weight=8 * nbytes / parameters if parameters else None,
        decode_tokens_per_second=decode_speed(model, windows[0, :16]),
        prefill_tokens_per_second=windows.numel() / seconds,
        peak_rss_nbytes=peak,
        dtype=str(dtype).removeprefix("torch."), hardware=hardware(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )  # fmt: skip


@torch.inference_mode()
def final_hidden(model: PreTrainedModel, window: Int[Tensor, " length"]) -> Tensor:
    """The input of the head for each token of a window."""
    with fast_bf16():
        return model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]


def _require_original(path: Path, vocab_size: int, against: Path) -> None:
    """Refuse models whose outputs cannot be compared; warn if the model was made from other files."""
    if is_compressed(against):
        raise ArtifactError(f"{against} is compressed; give the original model (--against)")
    original = open_checkpoint(against)
    if vocab_size != original.config.vocab_size:
        raise ArtifactError(
            f"{path} and {against} have vocabularies of different sizes, {vocab_size:,} and "
            f"{original.config.vocab_size:,}, so their outputs cannot be compared; give the original model (--against)"
        )
    if is_compressed(path):
        made = load_plan(path / PLAN_FILE).model
        if made.weights_hash != original.weights_hash():
            log.warning(
                "%s was not made from the files in %s, but from %s (weights %s)",
                path, against, made.id, made.weights_hash[:12],
            )  # fmt: skip


def _config(path: Path) -> Any:  # noqa: ANN401
    if is_compressed(path):
        return AutoConfig.from_pretrained(path, local_files_only=True)
    return open_checkpoint(path).config


@torch.inference_mode()
def read_hidden(
    model: PreTrainedModel, windows: Int[Tensor, "windows length"]
) -> Float[Tensor, "windows length hidden"]:
    """The input of the head for each token of some windows, read through the KV cache if that is quantised.

    Tokens are then read `READ_TOKENS` at a time, so a token sees up to READ_TOKENS - 1 more of the tokens before it
    unquantised than it would in generation.
    """
    if precision_of(model) is None:
        return torch.stack([final_hidden(model, window) for window in windows])
    cache, decoder = cache_for(model), model.get_decoder()
    with fast_bf16():
        parts = [
            decoder(input_ids=part.to(model.device), use_cache=True, **{CACHE: cache}).last_hidden_state
            for part in windows.split(READ_TOKENS, dim=1)
        ]
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    hidden: Tensor,
    window: Int[Tensor, " length"],
    reference: tuple[PreTrainedModel, Tensor] | None,
) -> Tensor:
    """Sum over a window's tokens: negative log-likelihood, KL(reference || model), agreement of the top-1 token.

    `reference` is the original model and its final hidden states for the window.
    """
    total = torch.zeros(3, dtype=torch.float64)
    slices = _logits(model, hidden[:-1])
    beside = _logits(reference[0], reference[1][:-1]) if reference is not None else None
    for part, logits in slices:
        if not bool(logits.isfinite().all()):
            raise NumericsError("a logit is not finite: the model overflows on this text; try --dtype float32")
        log_q = log_softmax(logits)
        labels = window[1:][part].to(log_q.device)
        total[0] += float(functional.nll_loss(log_q, labels, reduction="sum"))
        if beside is not None:
            log_p = log_softmax(next(beside)[1])
            total[1] += kl(log_p, log_q)
            total[2] += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return total


def _logits(model: PreTrainedModel, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    return logit_slices(model.get_output_embeddings(), model.config, hidden)
