"""TOGA-q's figures: learnt masks of precision beside channels chosen otherwise, and beside other methods.

    python benchmarks/bench_toga.py .models/SmolLM2-135M-Instruct.Q4_1.gguf --data DATA [--only PART ...]

Each cell is stored in benchmarks/results/toga.json as soon as it is done, and a cell that is there is not run again;
docs/toga.md is drawn from it at the end. The model is taken off its 4-bit grid first (benchmarks/offgrid.py), seed 0.
All methods see the same text of WikiText-2 train: 16 rows of 2,048 tokens for second moments and GPTQ, 150 further rows
for masks. Perplexity and KL are at context 2048, on the first 16 windows of WikiText-2 test and of C4. Masks are learnt
in 600 steps of 512 tokens, those of the options, of W3A16 and of W4A4 in 100. The part `full`, the paper's 2,000 steps
of 2,048 tokens and three seeds, is for a GPU, and is run where it is named alone; `errors`, `noise` and `gptq` are for
a CPU.
"""

import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from bench_main import CONTEXT, HERE, WINDOWS, WORK, Bench, command_line, measured_process, write_tables
from bench_qpruner import table
from trimbit.artifact.files import weight_nbytes
from trimbit.calibrate import text as texts
from trimbit.evaluate.perplexity import final_hidden, read_hidden, score
from trimbit.jobs.cache import save_atomically
from trimbit.jobs.progress import Progress, Silent
from trimbit.model.forward.compute import fastest_device
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.session import Session, open_session
from trimbit.report.training import shares
from trimbit.runtime.kv_cache import pack_cache
from trimbit.runtime.layers import PackedLinear
from trimbit.runtime.load import load_model, load_tokenizer
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Plan
from trimbit.search.methods.toga import learn
from trimbit.search.two_formats.tiles import TileProblem, as_masks
from trimbit.search.two_formats.training import Training
from trimbit.transform.quant import gptq, rtn
from trimbit.trial.masked.expected import ExpectedLinear
from trimbit.trial.masked.model import MaskedModel

RESULTS = HERE / "results" / "toga.json"
PAGE = HERE.parent / "docs" / "toga.md"
TEXTS = {"wikitext-2": "wikitext-2/wiki.test.raw", "c4": "text/c4_en_300.jsonl.gz"}
TRAIN = "wikitext-2/train_paragraphs_part.txt.gz"
NEAREST = "quant={name: rtn, params: {scales: mse}}"
ALONE = ("search.share=0.0", "search.sort=false")
W3A3 = ("search.low=int3g128", "search.low_acts={bits: 3, group: 128, clip: 0.9}")
SETTINGS = {  # channels by diag H, learnt masks, and what else there is at about the same bits
    "W3.2A3.2": (
        "atom-w3.2a3.2",
        "toga-q-w3.2a3.2",
        {
            "learnt, channel by channel": ("toga-q-w3.2a3.2", ("search.whole_tiles=false",)),
            "QuaRot, W3A3": ("quarot-w4a4", W3A3),
        },
    ),
    "W1.6A16": (
        "salient-w1.6a16",
        "toga-q-w1.6a16",
        {"PTQ1.61's layout": ("ptq161-w1.6a16", ())},
    ),
    "W2A16": (
        "salient-w2a16",
        "toga-q-w2a16",
        {
            "SliM": ("slim-w2a16", ()),
            "GPTQ, INT2": ("gptq-w2a16", ()),
            "RTN, INT2": ("rtn-w2a16", ()),
        },
    ),
    "W3A16": (
        "salient-w3a16",
        "toga-q-w3a16",
        {
            "SliM": ("slim-w3a16", ()),
            "GPTQ, INT3": ("gptq-w3a16", ()),
            "RTN, INT3": ("rtn-w3a16", ()),
        },
    ),
    "W4A4": (
        "atom-w4a4",
        "toga-q-w4a4",
        {"RTN, diag H, not sorted": ("atom-w4a4", (NEAREST, "search.sort=false")), "QuaRot": ("quarot-w4a4", ())},
    ),
}
ABLATION = {  # at W4A4, each step adds to those before it
    "RTN W4A4": "RTN, low format alone",
    "+ 12.5 % INT8": "RTN, diag H, not sorted",
    "+ reorder": "RTN, diag H",
    "+ GPTQ": "diag H",
    "+ KV4": "diag H, KV4",
}
CACHES = {"exact": "null", "4 bits, a head": "{bits: 4}", "4 bits, group 32": "{bits: 4, group: 32}",
          "3 bits, a head": "{bits: 3}", "8 bits, a head": "{bits: 8}"}  # fmt: skip
UNQUANTISED = "search={name: preset, params: {blocks: bf16, embedding: bf16}}"
OPTIONS = {  # at W1.6A16, in fewer steps: what of the masks' training differs from the recipe
    "as in the recipe": (),
    "loss of the next token": ("search.loss=lm",),
    "a logit for each channel, AdamW": ("search.network=logits", "search.learning_rate=0.05"),
    "a logit for each channel, along the gradient": (
        "search.network=logits", "search.optimizer=sgd", "search.learning_rate=25.0",
    ),
    "no prior": ("search.prior=0.0",),
    "Gumbel": ("search.estimator=gumbel", "search.temperature=0.4"),
    "errors of rank 0": ("search.residual_rank=0",),
    "rounded to nearest": ("search.error_model=rtn", "search.dense=true"),
    "GPTQ's versions": ("search.error_model=quantizer", "search.dense=true"),
}  # fmt: skip
FAST = ("search.checkpointing=false",)  # on a CPU the same masks, in more memory
MODES = {  # of the masks' training, and what each costs
    "expected errors, blocks run twice": ("search.checkpointing=true",),
    "expected errors": ("search.checkpointing=false",),
    "two roundings, packed, blocks run twice": (
        "search.error_model=rtn", "search.dense=false", "search.checkpointing=true",
    ),
    "two roundings, dense": ("search.error_model=rtn", "search.dense=true", "search.checkpointing=false"),
}  # fmt: skip
FASTEST = "expected errors"
MOST_PPL = 100_000  # of the picture: beyond it nothing is left of the model
OPERATORS = 10  # of a step's, that the page names
WEIGHTS = "0.41 (WikiText-2) and 0.15 (C4) at best"
CLAIMS = {  # of the abstract, on larger models and against its own baselines
    "W3.2A3.2": "0.79 at best, WikiText-2",
    "W1.6A16": WEIGHTS,
    "W2A16": WEIGHTS,
    "W3A16": WEIGHTS,
    "W4A4": "",
}
# the methods that are of the kinds which the paper claims to be ahead of
RIVALS = ("diag H", "QuaRot", "QuaRot, W3A3", "PTQ1.61's layout", "SliM", "GPTQ, INT2", "GPTQ, INT3")
WITH_ALL = ("W3.2A3.2", "W1.6A16", "W2A16")  # where channels at random, and shares by measured KL, are tried, too
OWN = ("learnt", "RTN, learnt")
WITH_KV4 = ("diag H", "learnt")  # the methods that are tried with keys and values in 4 bits, too
SHORTER = ("search.steps=100",)
FULL, SEEDS = ("search.steps=2000", "search.length=2048"), (0, 1, 2)  # paper's steps, DISP-LLM's tokens
FULLS = {setting: SETTINGS[setting][1] for setting in WITH_ALL} | {"W1.6A16, faithful": "toga-q-faithful"}
PARTS = ("settings", "tiles", "ranks", "noise", "gptq", "rounded", "kv", "options", "errors", "agreement", "cost")
SEEN = r"as the search sees them: KL ([0-9.]+)"  # in the notes of a plan
MASKS = ("diag H", "diag H, learnt shares", "learnt")  # the second has as many high channels at each site as the third
TILES = (1, 8, 16, 32)  # channels
RANKS = (0, 1, 4, 16, 64, 1536)  # of the last, all that is predicted
DRAWS = 3  # of the errors of all weights
ALL_LOGITS = ("search.network=logits",)
AGREEMENT: dict[str, tuple[str, ...]] = dict.fromkeys(WITH_ALL, ()) | {
    "W3.2A3.2, channel by channel": ("search.whole_tiles=false",)
}
ROUNDED = ("search.error_model=rtn", "search.dense=true")
ROWS = 8  # of the text, of each of which the gradient of one piece is compared
STEPS, ROUNDS = 4, 2  # of each mode whose cost is measured


def methods(setting: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Recipe and overrides of each method of a setting."""
    salient, learnt, more = SETTINGS[setting]
    steps = () if setting in WITH_ALL else SHORTER
    others = {
        "random": (salient, ("search.by=random",)),
        "shares by measured KL": (salient, ("search.name=shares",)),
    }
    return {
        "low format alone": (salient, ALONE),
        "RTN, low format alone": (salient, (NEAREST, *ALONE)),
        "RTN, diag H": (salient, (NEAREST,)),
        "diag H": (salient, ()),
        **(others if setting in WITH_ALL else {}),
        "learnt": (learnt, steps),
        "RTN, learnt": (learnt, (NEAREST, *steps)),
        **more,
    }


class Toga(Bench):
    """Whole recipes on two texts."""

    def opened(self, recipe: str, overrides: tuple[str, ...] = (), seed: int = 0) -> Session:
        fast = FAST if recipe.startswith("toga") else ()
        loaded = load_recipe(recipe, ("calibration.training=150", *fast, *overrides))
        return open_session(self.off_grid(0), loaded, calibration=str(self.folder / TRAIN), seed=seed)

    def run(
        self, recipe: str, overrides: tuple[str, ...] = (), *,
        texts: Iterable[str] = TEXTS, also_kv4: bool = False, seed: int = 0,
    ) -> dict:  # fmt: skip
        """Compress, and what is left on the texts; where masks are learnt, their shares and curve, too."""
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            return self.compressed(Path(folder) / "model", recipe, overrides, texts, also_kv4, seed)

    def compressed(
        self, out: Path, recipe: str, overrides: tuple[str, ...], texts: Iterable[str], also_kv4: bool, seed: int
    ) -> dict:
        """The same, in a folder that is given."""
        session = self.opened(recipe, overrides, seed)
        started = time.perf_counter()
        plan = session.find_plan(None)
        searched = time.perf_counter()
        written = session.write(plan, out)
        found = {
            "nbytes": weight_nbytes(out), "search_seconds": round(searched - started, 1),
            "method": plan.found_by.method,
            "apply_seconds": round(time.perf_counter() - searched, 1), "notes": list(plan.found_by.notes),
            "held_out_kl": written.found_by.measured_damage, "texts": {text: self.on(out, text) for text in texts},
        }  # fmt: skip
        layout = session.layout
        blocks = [weight for weight in layout.weights.values() if layout.readers(weight.site)]
        held = sum(s.nbytes for unit, own in layout.units_tensors(plan).items() if "." in unit for s in own.values())
        found["block_bits"] = round(8 * held / sum(weight.rows * weight.cols for weight in blocks), 4)
        if also_kv4:
            found["texts, KV4"] = {text: self.on(out, text, KVPrecision()) for text in texts}
        if plan.content in session.curves:
            curve, seen = session.curves[plan.content], re.search(SEEN, plan.found_by.notes[0])
            assert seen is not None
            found |= {
                "kl_in_search": float(seen[1]),
                "shares": shares(session.layout, plan, session.search[1].high),
                "losses": [round(step["loss"], 4) for step in curve],
            }
        return found

    def on(self, path: Path, text: str, kv_cache: KVPrecision | None = None) -> dict:
        """ppl@2048 and KL on a text, keys and values as the model caches them, or as is said here; on a GPU if any."""
        original, device = self.off_grid(0), fastest_device()
        windows = texts.evaluation_windows(
            self.folder / TEXTS[text], load_tokenizer(original), context=CONTEXT, limit=WINDOWS
        ).to(device)
        dense = load_model(original, torch.bfloat16).to(device)
        cached = WORK / f"dense-{original.name}-{text}-{device.type}.safetensors"
        if not cached.exists():
            hidden = {str(at): final_hidden(dense, window).clone() for at, window in enumerate(windows)}
            save_atomically(cached, lambda beside: save_file(hidden, beside))
        reference, model = load_file(cached, device.type), keep_dense(load_model(path, torch.bfloat16).to(device))
        if kv_cache is not None:
            pack_cache(model, kv_cache)
        totals = torch.zeros(3, dtype=torch.float64)
        for at, (window, hidden) in enumerate(zip(windows, read_hidden(model, windows), strict=True)):
            totals += score(model, hidden, window, (dense, reference[str(at)]))
        nll, kl, _ = (totals / (len(windows) * (CONTEXT - 1))).tolist()
        return {"ppl@2048": math.exp(nll), "kl": kl}

    def original(self) -> dict:
        return {
            "nbytes": weight_nbytes(self.off_grid(0)),
            "texts": {text: self.on(self.off_grid(0), text) for text in TEXTS},
        }

    def cache(self, precision: str) -> dict:
        """The original, its keys and values in few bits, and the bytes that they take."""
        kept = yaml.safe_load(precision)
        config = AutoConfig.from_pretrained(self.off_grid(0))
        size = cache_nbytes(config, {}, None if kept is None else KVPrecision(**kept), CONTEXT)
        return self.run("rtn-w4a4", (UNQUANTISED, f"kv_cache={precision}", "quant={name: rtn}")) | {
            "cache_nbytes": size
        }

    def errors(self, setting: str) -> dict:
        """E |(W - Q) x|^2 of one weight a site, GPTQ's and that of rounding to nearest, each over what is expected.

        The high channels are diag H's, and x is the input in the dense model.
        """
        session = self.opened(SETTINGS[setting][1])
        masked, plan, masks = diag_h(session)
        found: dict[str, dict[str, list[float]]] = {}
        for site in masks:
            name, layer, chosen = session.layout.readers(site)[0].name, masked.layers[site][0], masks[site] > 0
            w, h = session.checkpoint.tensor(f"{name}.weight").float(), session.stats.moments(site).h
            along, rest = expected_errors(layer, chosen)
            r = residuals(layer).double()
            expected = ((along.square() + rest).double() @ ((r @ h.double()) * r).sum(1)).sum()
            order, runs = torch.tensor(plan.orders[site]), plan.weights[name]
            moments, w = session.stats.moments(site).at(order), w[:, order]
            made = {
                "GPTQ": gptq.quantize(w, moments, runs, gptq.Config()),
                "rounded to nearest": rtn.quantize(w, None, runs, rtn.Config(scales="mse")),
            }
            own = found.setdefault(site.split(".", 2)[2], {kind: [] for kind in made})
            for kind, q in made.items():
                errors = (w - q.dequantize()).double()
                own[kind].append(round(float(((errors @ moments.h.double()) * errors).sum() / expected), 4))
        return {"ratios": found}

    def tiles(self) -> dict:
        """KL on the held-out rows, as the search sees it, of as many high codes by the same logits, by the tile.

        At W3.2A3.2.
        """
        session = self.opened(SETTINGS["W3.2A3.2"][1])
        config, problem = session.search[1], session.problem(session.limit(None))
        sites, masked = TileProblem(problem, config), session.masked(config)
        logits = learn(problem, config, sites)
        highest = {tile: highest_tiles(logits, sites, tile) for tile in TILES}
        free = [len(own) for own in highest[1].values()]
        return {
            "kl": {tile: masked.damage(as_masks(high, sites)).kl for tile, high in highest.items()},
            "less than half a tile": sum(count < config.tile / 2 for count in free) / len(free),
        }

    def rank(self, rank: int) -> dict:
        """KL on the held-out rows of diag H's masks at W2A16, with errors of this rank."""
        masked, _, masks = diag_h(self.opened(SETTINGS["W2A16"][1], (f"search.residual_rank={rank}",)))
        return {"kl": masked.damage(masks).kl}

    def noise(self, setting: str, kind: str) -> dict:
        """KL on the held-out rows, by masks: errors drawn anew for each token, and draws that all tokens share."""
        _, masked, _, masks, found = self.masked(setting, kind)
        return found | {
            "own": masked.damage(masks).kl,
            "shared": shared_kl(masked, masks, lambda seed: drawn_errors(masked, masks, seed)),
        }

    def gptq(self, setting: str, kind: str) -> dict:
        """KL on the held-out rows of the errors that GPTQ makes on the dense inputs, and with random signs of rows."""
        session, masked, plan, masks, _ = self.masked(setting, kind)
        made = gptq_errors(session, masked, plan)

        def as_made(site: str, at: int) -> Tensor:
            return made[site, at]

        def signs(seed: int) -> Errors:
            generator = torch.Generator().manual_seed(seed)

            def errors(site: str, at: int) -> Tensor:
                own = made[site, at]
                return own * (1 - 2 * torch.randint(0, 2, (len(own), 1), generator=generator))

            return errors

        with with_errors(masked, as_made):
            kl = masked.damage(masks).kl
        return {"kl": kl, "signs": shared_kl(masked, masks, signs)}

    def masked(self, setting: str, kind: str) -> tuple[Session, MaskedModel, Plan, dict[str, Tensor], dict[str, Any]]:
        """The model under masks of a kind, their plan, and how many channels of learnt masks diag H chooses, too."""
        session = self.opened(SETTINGS[setting][1])
        masked, plan, masks = diag_h(session)
        if kind == "diag H":
            return session, masked, plan, masks, {}
        config = session.search[1]
        sites = TileProblem(session.problem(session.limit(None)), config)
        learnt = sites.high(session.find_plan(None))
        top_channels = {site: sites.top_channels(site, len(own) // config.tile) for site, own in learnt.items()}
        alike = sum(len({*own} & {*top_channels[site]}) for site, own in learnt.items())
        high = learnt if kind == "learnt" else top_channels
        found = {"alike": round(alike / sum(map(len, learnt.values())), 4)}
        return session, masked, sites.plan(high, kind), as_masks(high, sites), found

    def rounded(self, setting: str) -> dict:
        """KL on the held-out rows of diag H's masks, as a search sees it whose versions are rounded to nearest."""
        masked, _, masks = diag_h(self.opened(SETTINGS[setting][1], ROUNDED))
        return {"kl": masked.damage(masks).kl}

    def agreement(self, name: str) -> dict:
        """Cosines of a first step's gradients for all logits, and of their signs, of each two of some rows.

        By loss; each row has a sample of the masks of its own.
        """
        found: dict[str, dict[str, list[float]]] = {}
        pairs = torch.triu_indices(ROWS, ROWS, 1)
        for loss in ("lm", "kl"):
            own = (*AGREEMENT[name], *ALL_LOGITS, f"search.loss={loss}", f"calibration.training={ROWS}")
            session = self.opened(SETTINGS[name.split(",")[0]][1], own)
            config, problem = session.search[1], session.problem(session.limit(None))
            training = Training(problem, config, TileProblem(problem, config))
            # of a row, of which one is taken: the others would be its neighbours
            pieces = session.recipe.calibration.length // config.length
            rows = []
            for row in range(ROWS):
                training.network.zero_grad()
                training.backward(row * pieces)
                rows.append(torch.cat([p.grad.flatten() for p in training.network.parameters() if p.grad is not None]))
            for kind, each in (("gradients", torch.stack(rows)), ("signs", torch.stack(rows).sign())):
                # the gradients' means are 0: what moves all logits alike is taken back by the budget
                flat = functional.normalize(each - each.mean(1, keepdim=True), dim=1)
                found.setdefault(kind, {})[loss] = [round(float(cosine), 4) for cosine in (flat @ flat.T)[*pairs]]
        return found

    def cost(self) -> dict:
        """Seconds of a whole step of 512 tokens in each mode, in turns, and its peak bytes above the imports'."""
        sessions = {mode: self.in_mode(mode) for mode in MODES}
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for mode in [*MODES] * ROUNDS:
            seconds[mode] += steps(sessions[mode])
        _, imports = measured_process([sys.executable, __file__, "--peak", "nothing"], None)
        again = [str(self.source), str(self.folder)]
        peaks = {
            mode: measured_process([sys.executable, __file__, "--peak", mode, *again], None)[1] - imports
            for mode in MODES
        }
        return {"step_seconds": seconds, "peaks": peaks, "operators": operators(sessions[FASTEST])}

    def in_mode(self, mode: str, count: int = STEPS) -> Session:
        """A session of so many steps, on no more text than they need."""
        return self.opened("toga-q-w3.2a3.2", (*MODES[mode], f"search.steps={count}", "calibration.training=2"))


def operators(session: Session) -> dict[str, float]:
    """Of the time of a training's second step, the part in each operator itself, the largest first."""
    ends = Profiled()
    train(session, ends)
    own = {event.key: event.self_cpu_time_total for event in ends.profile.key_averages()}
    whole = sum(own.values())
    return {key: round(own[key] / whole, 4) for key in sorted(own, key=own.__getitem__, reverse=True)[:OPERATORS]}


def steps(session: Session) -> list[float]:
    """Seconds of each step but the first, of a training that begins anew."""
    ends = Ends()
    train(session, ends)
    return [round(b - a, 3) for a, b in pairwise(ends.at)]


def train(session: Session, ends: "Ends") -> None:
    """A training that begins anew."""
    session.reporter, config = ends, session.search[1]
    with tempfile.TemporaryDirectory() as folder:  # modes share a key, and a finished training has no more steps
        problem = replace(session.problem(session.limit(None)), journal=Path(folder) / "masks.jsonl")
        learn(problem, config, TileProblem(problem, config))


def highest_tiles(logits: Mapping[str, Tensor], sites: TileProblem, tile: int) -> dict[str, list[int]]:
    """The channels of each site that are high where tiles of this size, of the highest logits, fill the codes."""
    orders = {site: own.argsort(descending=True, stable=True) for site, own in logits.items()}
    means = {site: own[orders[site]].view(-1, tile).mean(-1).tolist() for site, own in logits.items()}
    ranked = sorted((-mean, at, site) for site, own in means.items() for at, mean in enumerate(own))
    high, left = {site: list[int]() for site in logits}, sites.codes(sites.uniform_within_budget)
    for _, at, site in ranked:
        if (codes := sites.rows[site] * tile) <= left:
            high[site] += orders[site][at * tile : (at + 1) * tile].tolist()
            left -= codes
    return high


def diag_h(session: Session) -> tuple[MaskedModel, Plan, dict[str, Tensor]]:
    """The model under masks, and the plan and masks whose high channels are those of largest diag H."""
    config, problem = session.search[1], session.problem(session.limit(None))
    sites = TileProblem(problem, config)
    plan = sites.plan(
        {site: sites.top_channels(site, tiles) for site, tiles in sites.uniform_within_budget.items()}, "diag H"
    )
    return session.masked(config), plan, as_masks(sites.high(plan), sites)


Errors = Callable[[str, int], Tensor]  # of a weight of a site, by its place among those that read there


def expected_errors(layer: ExpectedLinear, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight, by column: what is along it, and the mean squares of the rest."""
    parts = ((layer.low, ~chosen), (layer.high, chosen))
    return layer.along(chosen) * layer.weight, sum(noise.rows @ (noise.cols * own[:, None]).T for noise, own in parts)


def residuals(layer: ExpectedLinear) -> Tensor:
    """The matrix that maps inputs to their residuals."""
    return layer.inputs.residuals(torch.eye(layer.weight.shape[1]).to(layer.weight)).T.float()


def drawn_errors(masked: MaskedModel, masks: Mapping[str, Tensor], seed: int) -> Errors:
    """As expected, what is left to chance normal."""
    generator = torch.Generator().manual_seed(seed)

    def errors(site: str, at: int) -> Tensor:
        layer = masked.layers[site][at]
        along, rest = (own.float() for own in expected_errors(layer, masks[site] > 0))
        drawn = rest.sqrt() * torch.randn(rest.shape, generator=generator)
        return -(along + drawn) @ residuals(layer)

    return errors


def gptq_errors(session: Session, masked: MaskedModel, plan: Plan) -> dict[tuple[str, int], Tensor]:
    """Those that GPTQ makes on the dense inputs, in the model's own order of channels."""
    found = {}
    for site, layers in masked.layers.items():
        order = torch.tensor(plan.orders[site])
        moments = session.stats.moments(site).at(order)
        for at, (weight, layer) in enumerate(zip(session.layout.readers(site), layers, strict=True)):
            w = layer.weight.float()
            q = gptq.quantize(w[:, order], moments, plan.weights[weight.name], gptq.Config()).dequantize()
            found[site, at] = q[:, order.argsort()].to(w) - w
    return found


@contextmanager
def with_errors(masked: MaskedModel, errors: Errors) -> Iterator[None]:
    """The model with these errors in its weights, and none that are expected."""
    before = []
    for site, layers in masked.layers.items():
        for at, layer in enumerate(layers):
            changed = {(layer, "weight"): layer.weight + errors(site, at).to(layer.weight)}
            for noise in (layer.low, layer.high):
                changed |= {(noise, name): torch.zeros_like(getattr(noise, name)) for name in ("along", "rows")}
            before += [(*key, getattr(*key)) for key in changed]
            for key, own in changed.items():
                setattr(*key, own)
    try:
        yield
    finally:
        for module, name, kept in before:
            setattr(module, name, kept)


def shared_kl(masked: MaskedModel, masks: Mapping[str, Tensor], draw: Callable[[int], Errors]) -> list[float]:
    """KL on the held-out rows of some draws of errors in the weights."""
    found = []
    for seed in range(DRAWS):
        with with_errors(masked, draw(seed)):
            found.append(masked.damage(masks).kl)
    return found


def keep_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its weights dequantised once, not in each of many short reads: the same figures, sooner."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.dense = {torch.bfloat16: layer.dense(torch.bfloat16)}.__getitem__
    return model


class Ends(Silent):
    """When each step of masks has ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield lambda *_: self.ended() if name == "masks" else None

    def ended(self) -> None:
        self.at.append(time.perf_counter())


class Profiled(Ends):
    """A profile of the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def ended(self) -> None:
        super().ended()
        if len(self.at) <= 2:
            (self.profile.start if len(self.at) == 1 else self.profile.stop)()


def write_page(results: dict) -> None:
    """Draw all tables and pictures of docs/toga.md."""
    parts = {
        "ablation": lambda r: texts_table(
            with_kv4(r), "step", {step: f"settings/W4A4/{method}" for step, method in ABLATION.items()}
        ),
        "settings": settings_table,
        "full": full_table,
        "ratios": ratios_table,
        "search": search_table,
        "tiles": tiles_table,
        "ranks": ranks_table,
        "noise": noise_table,
        "caches": lambda r: texts_table(r, "cache", {kind: f"kv/{kind}" for kind in CACHES}, "cache_nbytes"),
        "options": options_table,
        "errors": errors_table,
        "agreement": agreement_table,
        "cost": cost_table,
    }
    for part, rows in parts.items():
        write_tables(PAGE, "\n" + "\n".join(rows(results)) + "\n\n", part)
    if any(key.startswith("settings/") for key in results):
        draw_bits(results)
    draw_masks(results)


def texts_table(results: dict, head: str, keys: dict[str, str], size: str = "nbytes") -> list[str]:
    """Bytes, perplexity and KL of some cells, the original first; of weights, their bits, too."""
    weights = size == "nbytes"
    held = ["weight file, MB", "bits of a weight"] if weights else [f"keys and values of {CONTEXT:,} tokens, MB"]
    heads = [head, *held, *(f"{what}, {text}" for text in TEXTS for what in ("ppl@2048", "KL"))]
    rows = []
    for name, key in (({"original": "original"} if weights else {}) | keys).items():
        cell = results.get(key)
        if cell is None:
            figures = ["not run", *[""] * (len(heads) - 2)]
        else:
            bits = [f"{cell.get('block_bits', 16):.2f}"] if weights else []
            figures = [f"{cell[size] / 1e6:.2f}", *bits, *figures_of(cell)]
        rows.append([name, *figures])
    return table(heads, rows)


def figures_of(cell: dict) -> list[str]:
    found = [cell["texts"][text] for text in TEXTS]
    return [figure for own in found for figure in (f"{own['ppl@2048']:.2f}", f"{own['kl']:.3f}")]


def with_kv4(results: dict) -> dict:
    """The results, with the figures that a cell has under KV4 as a cell of their own."""
    kv4 = {f"{key}, KV4": cell | {"texts": own} for key, cell in results.items() if (own := cell.get("texts, KV4"))}
    return results | kv4


def settings_table(results: dict) -> list[str]:
    lines: list[str] = []
    for setting in SETTINGS:
        names = [*methods(setting), *(f"{method}, KV4" for method in WITH_KV4)]
        keys = {method: f"settings/{setting}/{method}" for method in names}
        lines += [f"### {setting}", "", *texts_table(with_kv4(results), "method", keys), ""]
    if any(key.startswith("settings/") for key in results):
        lines += ["![KL and perplexity against bits](toga-bits.png)", ""]
    if any(key.endswith("/learnt") for key in results):
        lines += ["![Learnt masks](toga-masks.png)"]
    return lines


def full_table(results: dict) -> list[str]:
    """Learnt masks at full length, by seed, as far as they were run."""
    keys = {f"{name}, seed {seed}": f"full/{name}/{seed}" for name in FULLS for seed in SEEDS}
    run = {name: key for name, key in keys.items() if key in results}
    return texts_table(results, "learnt", run) if run else ["not run"]


def ratios_table(results: dict) -> list[str]:
    """Perplexity with learnt masks over that of each other method, and of the bits of a weight of the blocks."""
    rows = []
    for setting, claim in CLAIMS.items():
        for method in methods(setting):
            kind = "RTN, learnt" if method.startswith("RTN") else "learnt"
            own, cell = (results.get(f"settings/{setting}/{name}") for name in (kind, method))
            if own and cell and method not in OWN:
                ratios = (own["texts"][text]["ppl@2048"] / cell["texts"][text]["ppl@2048"] for text in TEXTS)
                bits = own["block_bits"] / cell["block_bits"]
                said = claim if method in RIVALS else ""
                rows.append([setting, method, kind, *(f"{ratio:.3g}" for ratio in ratios), f"{bits:.3f}", said])
    heads = ["setting", "against", "masks", *(f"ratio of ppl, {text}" for text in TEXTS), "ratio of bits", "the paper"]
    return table(heads, rows or [["not run", *[""] * (len(heads) - 1)]])


def search_table(results: dict) -> list[str]:
    """KL on held-out rows: what the search saw, and what is left of it once packed."""
    rows = []
    for setting in SETTINGS:
        drawn, rounded = results.get(f"noise/{setting}/diag H"), results.get(f"rounded/{setting}")
        for kind in ("diag H", "learnt"):
            packed, nearest = (results.get(f"settings/{setting}/{method}{kind}") for method in ("", "RTN, "))
            if packed and nearest:
                seen = packed.get("kl_in_search", drawn["own"] if drawn else None)
                found = (seen, packed["held_out_kl"], rounded["kl"] if rounded and kind == "diag H" else None)
                figures = (*found, nearest["held_out_kl"])
                rows.append([setting, kind, *("" if kl is None else f"{kl:.3f}" for kl in figures)])
    heads = ("seen, errors as expected", "packed, GPTQ", "seen, rounded to nearest", "packed, RTN")
    return table(["setting", "masks", *heads], rows or [["not run", *[""] * (len(heads) + 1)]])


def ranks_table(results: dict) -> list[str]:
    """KL on held-out rows of the errors that are expected, by the rank of what is predicted."""
    found = [results.get(f"ranks/{rank}") for rank in RANKS]
    return table(
        ["rank", *map(str, RANKS)], [["KL", *("not run" if one is None else f"{one['kl']:.3f}" for one in found)]]
    )


def noise_table(results: dict) -> list[str]:
    """KL on held-out rows, by which errors the weights have: as expected, GPTQ's, and packed."""
    rows = []
    for setting, kind in ((setting, kind) for setting in WITH_ALL for kind in MASKS):
        drawn, made, packed = (results.get(f"{part}/{setting}/{kind}") for part in ("noise", "gptq", "settings"))
        figures = [f"{drawn['own']:.3f}", draws(drawn["shared"])] if drawn else ["not run", ""]
        figures += [draws(made["signs"]), f"{made['kl']:.3f}"] if made else ["", ""]
        rows.append([setting, kind, *figures, f"{packed['held_out_kl']:.3f}" if packed else ""])
    heads = ("of each token's own", "shared by all tokens", "GPTQ's, signs at random", "GPTQ's, dense inputs", "packed")
    return table(["setting", "masks", *heads], rows)


def tiles_table(results: dict) -> list[str]:
    """KL on held-out rows, as the search sees it, by the tile that high channels come in."""
    cell = results.get("tiles")
    figures = [f"{cell['kl'][str(tile)]:.3f}" if cell else "not run" for tile in TILES]
    return table(["single channels" if tile == 1 else f"tiles of {tile}" for tile in TILES], [figures])


def draws(found: list[float]) -> str:
    """Mean and range."""
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def options_table(results: dict) -> list[str]:
    """KL on held-out rows, as the search saw it and packed."""
    rows = []
    for name, key in {"diag H": "settings/W1.6A16/diag H", **{one: f"options/{one}" for one in OPTIONS}}.items():
        cell = results.get(key)
        seen = "" if cell is None or "kl_in_search" not in cell else f"{cell['kl_in_search']:.3f}"
        rows.append([name, *(("not run", "") if cell is None else (seen, f"{cell['held_out_kl']:.3f}"))])
    return table(["masks", "as the search sees it", "packed, GPTQ"], rows)


def cost_table(results: dict) -> list[str]:
    cell = results.get("cost")
    if cell is None:
        return ["not run"]
    each = {kind: sorted(own) for kind, own in cell["step_seconds"].items()}
    base = median(next(iter(each.values())))
    rows = [
        [kind, f"{median(own):.2f}", f"{own[0]:.2f} to {own[-1]:.2f}", f"{median(own) / base:.2f}",
         f"{cell['peaks'][kind] / 1e6:.0f}"]
        for kind, own in each.items()
    ]  # fmt: skip
    lines = table(["while masks are learnt", "seconds a step, median", "range", "ratio", "peak, MB"], rows)
    shares = sorted(cell["operators"].items(), key=lambda own: -own[1])
    top_channels = [[f"`{name}`", f"{100 * share:.1f}"] for name, share in shares]
    return [*lines, "", *table([f"operator, while masks are learnt: {FASTEST}", "% of a step"], top_channels)]


def errors_table(results: dict) -> list[str]:
    """Medians over blocks, and the range."""
    rows = []
    for setting in WITH_ALL:
        cell = results.get(f"errors/{setting}", {"ratios": {"not run": {}}})
        for site, kinds in cell["ratios"].items():
            ratios = (f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for own in kinds.values())
            rows.append([setting, site, *(ratios if kinds else ("", ""))])
    heads = ["setting", "site", "GPTQ / expected", "rounded to nearest / expected"]
    return table(heads, rows)


def agreement_table(results: dict) -> list[str]:
    """Means over pairs of rows, and the range."""
    rows = []
    for name in AGREEMENT:
        if cell := results.get(f"agreement/{name}"):
            own = (cell[kind][loss] for kind in ("gradients", "signs") for loss in ("lm", "kl"))
            rows.append([name, *map(draws, own)])
    heads = ["setting", *(f"{kind}, {loss}" for kind in ("gradients", "signs") for loss in ("next token", "KL"))]
    return table(heads, rows or [["not run", *[""] * (len(heads) - 1)]])


def draw_bits(results: dict) -> None:
    """KL and perplexity on both texts against the true bits of a weight of the blocks, a mark a method."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, 2, figsize=(11, 9), layout="constrained", sharex=True, sharey="row")
    marks: dict[str, Any] = {}
    names = list(dict.fromkeys(method for setting in SETTINGS for method in methods(setting)))
    for panels, (what, label) in zip(
        rows, (("kl", "KL to the original, nats a token"), ("ppl@2048",) * 2), strict=True
    ):
        for axes, text in zip(panels, TEXTS, strict=True):
            for at, method in enumerate(names):
                kind = {"marker": "osD^vP*X<>h"[at % 11], "color": f"C{at % 10}", "linestyle": ""}
                for setting in SETTINGS:
                    if cell := results.get(f"settings/{setting}/{method}"):
                        fill_by_knapsack = "full" if setting.endswith("A16") else "none"
                        point = axes.plot(
                            cell["block_bits"], cell["texts"][text][what], fillstyle=fill_by_knapsack, **kind
                        )
                        marks[method] = point[0] if fill_by_knapsack == "full" else marks.get(method, point[0])
            axes.set(title=text, yscale="log")
        panels[0].set_ylabel(label)
    for axes in rows[1]:
        axes.set_xlabel("bits of a weight of the blocks, scales and index lists included")
    rows[1][0].set_ylim(top=MOST_PPL)
    title = f"filled: weights alone; hollow: activations, too; perplexities above {MOST_PPL:,} are not drawn"
    figure.legend(
        marks.values(), marks, loc="outside lower center", ncols=5, fontsize="small", frameon=False, title=title
    )
    figure.savefig(PAGE.with_name("toga-bits.png"), dpi=110)
    pyplot.close(figure)


def draw_masks(results: dict) -> None:
    """The share of high channels by block and site, and the loss, of each setting's learnt masks."""
    from matplotlib import pyplot

    cells = {s: results[k] for s in SETTINGS if (k := f"settings/{s}/learnt") in results}
    if not cells:
        return
    figure, rows = pyplot.subplots(len(cells), 2, figsize=(11, 2.8 * len(cells)), layout="constrained", squeeze=False)
    for (left, right), (setting, cell) in zip(rows, cells.items(), strict=True):
        for site, own in cell["shares"].items():
            left.plot(range(len(own)), [100 * share for share in own], marker=".", label=site)
        left.set(title=f"{setting}, {len(cell['losses'])} steps", xlabel="block", ylabel="high channels, %")
        left.set_ylim(0, 125 * max(max(own) for own in cell["shares"].values()))  # room for the legend
        left.legend(frameon=False, ncols=4, fontsize="small", loc="upper right")
        losses = torch.tensor(cell["losses"])
        right.plot(range(1, len(losses) + 1), losses, color="0.85", lw=0.8)
        means = losses.unfold(0, 25, 1).mean(-1)
        right.plot(range(25, len(losses) + 1), means, label="mean of 25 steps")
        right.set(xlabel="step", ylabel="loss, nats a token")
        right.legend(frameon=False)
    figure.savefig(PAGE.with_name("toga-masks.png"), dpi=110)
    pyplot.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        if sys.argv[2] != "nothing":
            steps(Toga(Path(sys.argv[3]), Path(sys.argv[4]), RESULTS).in_mode(sys.argv[2], 2))
        return
    options = command_line(__doc__, PARTS, ("full",))
    bench = Toga(options.source, options.data, RESULTS)
    bench.cell("original", bench.original)
    if "settings" in options.only:
        for setting in SETTINGS:
            for method, (recipe, own) in methods(setting).items():
                kv4 = method in WITH_KV4
                bench.cell(f"settings/{setting}/{method}", lambda r=recipe, o=own, k=kv4: bench.run(r, o, also_kv4=k))
    if "full" in options.only:
        for name, recipe in FULLS.items():
            for seed in SEEDS:
                bench.cell(f"full/{name}/{seed}", lambda r=recipe, n=seed: bench.run(r, FULL, seed=n))
    if "tiles" in options.only:
        bench.cell("tiles", bench.tiles)
    if "ranks" in options.only:
        for rank in RANKS:
            bench.cell(f"ranks/{rank}", lambda r=rank: bench.rank(r))
    if "noise" in options.only:
        for setting in WITH_ALL:
            for kind in MASKS:
                bench.cell(f"noise/{setting}/{kind}", lambda s=setting, k=kind: bench.noise(s, k))
    if "gptq" in options.only:
        for setting in WITH_ALL:
            for kind in ("diag H", "learnt"):
                bench.cell(f"gptq/{setting}/{kind}", lambda s=setting, k=kind: bench.gptq(s, k))
    if "rounded" in options.only:
        for setting in WITH_ALL:
            bench.cell(f"rounded/{setting}", lambda s=setting: bench.rounded(s))
    if "kv" in options.only:
        for kind, precision in CACHES.items():
            bench.cell(f"kv/{kind}", lambda p=precision: bench.cache(p))
    if "options" in options.only:
        for option, own in OPTIONS.items():
            bench.cell(f"options/{option}", lambda o=(*SHORTER, *own): bench.run("toga-q-w1.6a16", o, texts=()))
    if "errors" in options.only:
        for setting in WITH_ALL:
            bench.cell(f"errors/{setting}", lambda s=setting: bench.errors(s))
    if "agreement" in options.only:
        for name in AGREEMENT:
            bench.cell(f"agreement/{name}", lambda n=name: bench.agreement(n))
    if "cost" in options.only:
        bench.cell("cost", bench.cost)
    write_page(bench.results)


if __name__ == "__main__":
    main()
