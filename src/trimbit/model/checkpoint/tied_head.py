"""A head that is stored although the config ties it to the embedding: the two are compared, as in transformers."""

import logging
from collections.abc import Mapping

import torch
from safetensors import safe_open
from transformers.configuration_utils import PreTrainedConfig

from trimbit.model.checkpoint.checkpoint import Entry
from trimbit.model.families import FAMILIES

_LOG = logging.getLogger(__name__)
_ROWS = 4096  # compared at a time, to bound memory


def settle_tied_head(config: PreTrainedConfig, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a model without a duplicate of the embedding, if the config ties the head to it.

    A stored head that equals the embedding is left out. A head that differs is kept, and `config` is set to untied: the
    head is then counted and compressed like any other weight. A head without an embedding replaces the embedding.

    Args:
        config: changed in place if the head differs.
        entries: tensors of safetensors files, by their names in transformers.
    """
    found = dict(entries)
    family = FAMILIES.get(config.model_type)
    if family is None or not config.tie_word_embeddings:
        return found
    embed, head = f"{family.embed}.weight", f"{family.head}.weight"
    if head not in found:
        return found
    if embed not in found:
        found[embed] = found.pop(head)
    elif _same(embed, found[embed], head, found[head]):
        del found[head]
    else:
        config.tie_word_embeddings = False
        _LOG.warning(
            "%s: the config ties %s to %s, but their values differ; treating them as untied",
            found[head].file, head, embed,
        )  # fmt: skip
    return found


def _same(embed: str, table: Entry, head: str, other: Entry) -> bool:
    """Whether two stored matrices have the same values; they are read some rows at a time."""
    if table.shape != other.shape:
        return False
    with (
        safe_open(table.file, framework="pt", device="cpu") as first,
        safe_open(other.file, framework="pt", device="cpu") as second,
    ):
        a, b = first.get_slice(embed), second.get_slice(head)
        parts = (slice(at, at + _ROWS) for at in range(0, table.shape[0], _ROWS))
        return all(torch.equal(a[part].float(), b[part].float()) for part in parts)
