"""TOGA-q's figures: learnt masks of precision beside channels chosen otherwise, and beside other methods.

    python benchmarks/bench_toga.py .models/SmolLM2-135M-Instruct.Q4_1.gguf --data DATA [--only PART ...]

Each cell is stored in benchmarks/results/toga.json as soon as it is done, and a cell that is there is not run again;
docs/toga.md is drawn from it at the end. The model is taken off its 4-bit grid first (benchmarks/offgrid.py), seed 0.
All methods see the same text of WikiText-2 train: 16 rows of 2,048 tokens for second moments and GPTQ, 150 further rows
for masks. Perplexity and KL are at context 2048, on the first 16 windows of WikiText-2 test and of C4. Masks are learnt
in 600 steps of 512 tokens.
"""

import argparse
import math
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench_main import CONTEXT, HERE, WINDOWS, WORK, Bench, write_tables
from trimbit import data
from trimbit.artifact import weight_nbytes
from trimbit.evaluate import final_hidden, load_model, load_tokenizer, read_hidden, score
from trimbit.learning import shares
from trimbit.pipeline import Session, open_session
from trimbit.recipe import load_recipe

RESULTS = HERE / "results" / "toga.json"
PAGE = HERE.parent / "docs" / "toga.md"
TEXTS = {"wikitext-2": "wikitext-2/wiki.test.raw", "c4": "text/c4_en_300.jsonl.gz"}
TRAIN = "wikitext-2/train_paragraphs_part.txt.gz"
NEAREST = "quant={name: rtn, params: {scales: mse}}"
KV4 = "kv_cache={bits: 4}"
ABLATION = {  # each step adds to those before it
    "RTN W4A4": ("rtn-w4a4", ()),
    "+ 12.5 % INT8": ("atom-w4a4", (NEAREST, "search.sort=false")),
    "+ reorder": ("atom-w4a4", (NEAREST,)),
    "+ GPTQ": ("atom-w4a4", ()),
    "+ KV4": ("atom-w4a4", (KV4,)),
}
SETTINGS = {  # channels by diag H, learnt masks, and what else there is of the same bits
    "W3.2A3.2": ("atom-w3.2a3.2", "toga-q-w3.2a3.2", {}),
    "W1.6A16": ("salient-w1.6a16", "toga-q-w1.6a16", {"PTQ1.61's layout": ("salient-w1.6a16", ("search.low=mbinaryrow",))}),
    "W2A16": ("salient-w2a16", "toga-q-w2a16", {"SliM": ("slim-w2a16", ()), "GPTQ, INT2": ("slim-w2a16", ("quant",))}),
    "W3A16": ("salient-w3a16", "toga-q-w3a16", {"SliM": ("slim-w3a16", ())}),
    "W4A4": ("atom-w4a4", "toga-q-w4a4", {"QuaRot": ("quarot-w4a4", ())}),
}
PARTS = ("ablation", "settings", "kv", "options", "cost")
SEEDS = (0,)


def methods(setting: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Recipe and overrides of each method of a setting."""
    salient, learnt, more = SETTINGS[setting]
    return {
        "RTN, low format alone": (salient, (NEAREST, "search.share=0.0", "search.sort=false")),
        "GPTQ, low format alone": (salient, ("search.share=0.0", "search.sort=false")),
        "RTN, diag H": (salient, (NEAREST,)),
        "random": (salient, ("search.by=random",)),
        "diag H": (salient, ()),
        "shares by measured KL": (salient, ("search.name=shares",)),
        "learnt": (learnt, ()),
        **more,
    }
