"""What the tests of measurements measure: tokens and a small space."""

import torch

from tiny import VOCAB
from trimbit.schema.plan import ModelRef
from trimbit.schema.precision import parse_precision
from trimbit.schema.space import Space

TOKENS = torch.randint(3, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))


REF = ModelRef(id="tiny", config_hash="0", weights_hash="0")


INT2, INT4, INT8 = (parse_precision(name) for name in ("int2g32", "int4g32", "int8row"))


SPACE = Space(
    formats=(INT2, INT4),
    embedding_formats=(INT4, INT8),
    widths=(1.0, 0.5, 0.0),
    prune_kv_groups=True,
    channel_multiple=16,
)
