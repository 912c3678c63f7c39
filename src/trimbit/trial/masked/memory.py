"""How much memory a model under masks takes, from sizes alone."""

from trimbit.model.layout import Layout
from trimbit.search.two_formats.config import MaskedSearch, MaskTraining
from trimbit.search.two_formats.hypernetwork import HIDDEN


def masked_nbytes(layout: Layout, config: MaskedSearch, itemsize: int) -> int:
    """Bytes of both formats or the weights, embeddings, a row's activations, learnt parameters and AdamW's state.

    Args:
        layout: of the model.
        config: of the search.
        itemsize: bytes of a number in matrix products.
    """
    embeddings = sum(w.rows * w.cols for w in layout.weights.values() if not layout.readers(w.site))
    codes = sum(w.rows * w.cols for w in layout.weights.values()) - embeddings
    two = 2 * itemsize if config.dense else (config.low.bits + config.high.bits) / 8
    expected = config.error_model == "expected"
    each, ranks = (itemsize, 2 * config.rank * itemsize) if expected else (two, 0)
    width = (16 + 3 * expected) * layout.sizes["hidden"] + (8 + expected) * layout.sizes["mid"]
    kept_whole = isinstance(config, MaskTraining) and not config.checkpointing
    kept = layout.blocks * (2 * width if kept_whole else 4 * layout.sizes["hidden"]) + 2 * width
    channels = sum(
        layout.readers(site)[0].cols for site in {w.site for w in layout.weights.values()} if layout.readers(site)
    )
    learnt = {"hypernetwork": 16 * 2 * HIDDEN, "logits": 16}.get(getattr(config, "network", ""), 0)  # with AdamW's
    nbytes: float = codes * each + 4 * embeddings + config.length * kept + (learnt + ranks) * channels
    return round(nbytes)
