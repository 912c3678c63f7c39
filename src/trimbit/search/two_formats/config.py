"""Two formats in every weight of the blocks: the formats, and how masks are tried and learnt."""

from typing import Literal

from pydantic import Field, model_validator

from trimbit.schema.activations import ActInt
from trimbit.schema.base import Schema
from trimbit.schema.precision import BF16, Int, Precision

ErrorModels = Literal["rtn", "quantizer", "expected"]


class TwoFormats(Schema):
    """The two formats of weights and of inputs, and how many channels are high."""

    low: Precision = Int(bits=4, group=128, symmetric=True)  # code (efeslab/Atom)
    high: Precision = Int(bits=8, group=128, symmetric=True)
    low_acts: ActInt | None = None  # None: the inputs of low channels are not rounded
    high_acts: ActInt | None = None
    # share of the codes in high channels if no budget is given; 0: none, whatever the budget
    share: float = Field(default=0.125, ge=0, le=1)
    tile: int = Field(default=32, ge=1)  # ours: high channels of a site are a multiple of this
    sort: bool = True  # channels by diag H within low and high; false: they keep their order there
    embedding: Precision = BF16  # of the embedding and the head


class MaskedSearch(TwoFormats):
    """The model and the rows that masks are tried on; its embedding and head are dense, whatever `embedding` is.

    `error_model` is how a format acts on a weight meanwhile: `rtn` rounds it to nearest, `quantizer` as the quantiser
    does; `expected` rounds nothing, but adds noise to the output, as large as the expected error of GPTQ (ours).
    """

    share: float = Field(default=0.125, gt=0, le=1)
    error_model: ErrorModels = "rtn"
    length: int = Field(default=2048, ge=16)  # code (DISP-LLM): tokens of a row
    residual_rank: int | None = Field(default=None, ge=0)  # of the prediction by later columns; None: ours, 16
    dense: bool = False  # keep both rounded weights unpacked, in bf16 or fp32: faster, with the same result

    @model_validator(mode="after")
    def _check_dense(self) -> "MaskedSearch":
        if self.dense and self.error_model == "expected":
            raise ValueError("`dense` keeps rounded weights, but error_model=expected rounds none: leave it out")
        if self.residual_rank is not None and self.error_model != "expected":
            raise ValueError("`residual_rank` needs error_model=expected")
        return self

    @property
    def rank(self) -> int:
        """The rank of the prediction by later columns."""
        return 16 if self.residual_rank is None else self.residual_rank

    def compared(self, rows: int) -> int:
        """How many of the `rows` training rows are compared with the original."""
        raise NotImplementedError

    def cuda_graphs(self, device: str) -> bool:
        """Whether gradients are computed by CUDA graphs, with which the noise is different."""
        return False


class MaskTraining(MaskedSearch):
    """How masks are learnt from the training text."""

    steps: int = Field(default=2000, ge=1)  # paper
    batch: int = Field(default=1, ge=1)  # paper: rows of a step
    loss: Literal["lm", "kl"] = "lm"  # paper: of the next token; ours: KL(original || model)
    checkpointing: bool = True  # keep only each block's input, and run the block again for its gradients

    def cuda_graphs(self, device: str) -> bool:
        """On a GPU, if blocks do the same operations for every row and mask (`trial/masked/cuda_graphs.py`).

        With rounded inputs the operations depend on the masks; packed weights are unpacked by tables on the CPU.
        """
        same = self.low_acts is None and self.high_acts is None and (self.error_model == "expected" or self.dense)
        return device == "cuda" and same and not self.checkpointing

    def compared(self, rows: int) -> int:
        """All rows for the KL, else none."""
        return rows if self.loss == "kl" else 0
