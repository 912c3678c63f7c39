"""QPruner's figures: whole recipes at three ratios, and how low-rank pairs start.

    python benchmarks/bench_qpruner.py .models/SmolLM2-135M-Instruct.Q4_1.gguf --data DATA [--only PART ...]

Each cell is stored in benchmarks/results/qpruner.json as soon as it is done, and a cell that is there is not run again;
docs/qpruner.md is drawn from it at the end. Model, calibration, perplexity and KL as in bench_main.py; seed 0. Recovery
distils the original on instructions, 100 steps of 16 rows of at most 256 tokens; tasks are the first 500 documents.
"""

import gzip
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from scipy.stats import spearmanr

from bench_main import CONTEXT, HERE, WINDOWS, WORK, Bench, command_line, measured_process, write_tables
from trimbit.artifact.files import weight_nbytes
from trimbit.calibrate import text as texts
from trimbit.evaluate.lm_eval import evaluate_tasks
from trimbit.evaluate.perplexity import final_hidden, score
from trimbit.evaluate.tasks import SOURCES
from trimbit.jobs.progress import Silent
from trimbit.measure.choices import background_of
from trimbit.measure.damage import install
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.pipeline.session import Session, compress
from trimbit.runtime.load import load_model, load_tokenizer
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan
from trimbit.search.methods.bayes import known_trials
from trimbit.search.solvers.box import Box, feasible_points
from trimbit.search.variables import variables

RESULTS = HERE / "results" / "qpruner.json"
PAGE = HERE.parent / "docs" / "qpruner.md"
FORMATS = {4: "nf4g64", 3: "uint3g64", 2: "uint2g64"}
STARTS = ("zeros", "loftq", "qera")
RANK = 8
RECIPES = ("llm-pruner", "qpruner-3", "qpruner-1", "qpruner-2")  # in the order that they are run
RATIOS = (20, 50, 30)  # in the order that they are run
VARIANTS = {  # recipe and overrides, at the first ratio; a faithful trial takes a minute for each 100 documents
    "faithful": ("qpruner-3-faithful", ("search.objective.documents=100",)),
}
SHORT = 128  # tokens, the other context of perplexity
DOCUMENTS = 500
PARTS = ("start", "recipes", "plans", "ranks", "noise", "estimators")
PEAKS = ("training", "checkpointed", "inference")
SEEDS = (0, 1, 2)
RANDOM = 10  # random plans that are judged on test text
MENUS = {  # what shares a format, the formats, how scales are found, and whether the budget is uniform NF4's
    "4 and 8 bits by block": ("block", "nf4g64, int8row", "absmax", False),
    "2, 3, 4 and 8 bits by weight": ("weight", "uint2g64, uint3g64, nf4g64, int8row", "mse", True),
}
KNAPSACK = "search={name: knapsack, params: {pruning_costs: [1.0], no_pruning: false, uniform: null}}"
ESTIMATORS = ("quantiles", "histogram")
MODELS = {"pruned by 20 %": (), "not pruned": ("prune=null",)}


class Timed:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        started = time.perf_counter()
        yield lambda _done, _total: None
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 1)


class QPruner(Bench):
    """Cells about pairs and whole recipes."""

    def start(self, bits: int, start: str) -> dict:
        """KL of the model before any training, its blocks in one format, the table in bf16."""
        original, out = self.off_grid(0), WORK / "pairs"
        shutil.rmtree(out, ignore_errors=True)
        own = ("tune=null", "quant.scales=mse", f"search.blocks={FORMATS[bits]}")
        pairs = (f"lowrank.init={start}", f"lowrank.rank={RANK}")
        plan = compress(self.session(original, "loftq-only", 0, (*own, *pairs)), None, out)
        kl = plan.found_by.measured_damage
        return {"nbytes": weight_nbytes(out), "held_out_kl": kl} | self.quality(out, original)

    def recovering(self, recipe: str, ratio: int | None) -> Session:
        """A recipe with this benchmark's recovery."""
        instructions = self.folder / "instruct" / "alpaca_2000.jsonl.gz"
        own = () if ratio is None else (f"prune.ratio={ratio / 100}",)
        based, changes = VARIANTS.get(recipe, (recipe, ()))
        if recipe == "faithful":
            own += (f"search.objective.data={self.others()}",)
        return self.session(self.off_grid(0), based, 0, (f"tune.data={instructions}", *own, *changes))

    def others(self) -> Path:
        """HellaSwag without the documents that results are reported on: what a search may choose by."""
        folder, name = WORK / "tasks-to-search-by", f"{SOURCES['hellaswag'].stem}.jsonl"
        with gzip.open(self.folder / "tasks" / f"{name}.gz", "rt", encoding="utf-8") as rows:
            left = list(rows)[DOCUMENTS:]
        assert len(left) >= 100, "the search by accuracy asks for 100 documents"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(left), encoding="utf-8")
        return folder

    def whole(self, recipe: str, ratio: int | None) -> dict:
        """The recipe as it is, and what its model is worth on text; the directory stays for the other cells."""
        out, session = made(recipe, ratio), self.recovering(recipe, ratio)
        shutil.rmtree(out, ignore_errors=True)
        session.reporter = timed = Timed()
        plan = compress(session, None, out)
        tuning = json.loads((out / "tuning.json").read_text())
        with safe_open(out / "model.safetensors", "pt") as file:
            pairs = sum(2 * math.prod(file.get_slice(k).get_shape()) for k in file.keys() if ".adapter." in k)  # noqa: SIM118
        shares = {}
        for name, runs in plan.weights.items():
            if name.startswith("model.layers."):
                weight, run = session.layout.weights[name], runs[0]
                width = plan.widths.get(session.layout.units[weight.unit].dim or "")
                rows = session.layout.weight_shape(weight, width)[0]
                shares[run.precision.name] = shares.get(run.precision.name, 0) + run.count * rows
        losses = tuning["losses"]
        trials = session.search[1].optimiser.trials if (out / "trials.csv").exists() else 0
        return {
            "nbytes": weight_nbytes(out), "adapter_nbytes": pairs,
            "trained_nbytes": tuning["trained_nbytes"], "optimizer_nbytes": tuning["optimizer_nbytes"],
            "first_losses": sum(losses[:10]) / 10, "last_losses": sum(losses[-10:]) / 10,
            "held_out_kl": plan.found_by.measured_damage, "stage_seconds": timed.seconds, "steps": len(losses),
            "notes": list(plan.found_by.notes), "trials": trials, "block_weights_by_format": shares,
        } | self.quality(out, self.off_grid(0)) | {"ppl@128": self.short(out)}  # fmt: skip

    def original(self) -> dict:
        original = self.off_grid(0)
        return (
            {"nbytes": weight_nbytes(original)} | self.quality(original, original) | {"ppl@128": self.short(original)}
        )

    def short(self, path: Path) -> float:
        """Perplexity of windows of 128 tokens, of the same text."""
        text = self.folder / "wikitext-2" / "wiki.test.raw"
        windows = texts.evaluation_windows(text, load_tokenizer(path), context=SHORT, limit=WINDOWS * CONTEXT // SHORT)
        model = load_model(path, torch.bfloat16)
        total = sum(float(score(model, final_hidden(model, window), window, None)[0]) for window in windows)
        return math.exp(total / (len(windows) * (SHORT - 1)))

    def tasks(self, path: Path) -> dict:
        """Seven tasks: the headline of each in percent, with its standard error."""
        found = evaluate_tasks(
            path, tuple(SOURCES), folder=self.folder / "tasks", limit=DOCUMENTS, dtype=torch.bfloat16, reporter=Silent()
        )
        each = {name: (100 * task.score.value, 100 * (task.score.stderr or 0)) for name, task in found.tasks.items()}
        mean = found.task_mean
        correct = {name: task.correct for name, task in found.tasks.items()}
        mean_and_error = (100 * mean.value, 100 * (mean.stderr or 0))
        return {"tasks": each, "mean": mean_and_error, "correct": correct, "versions": found.versions}

    def memory(self, recipe: str, ratio: int | None) -> dict:
        """Peak resident bytes above the imports' of two steps of recovery, and of one window of 2,048 tokens."""
        out = made(recipe, ratio)
        self.recovering(recipe, ratio).recovery.prepare(steps=2)  # the original's answers are no part of a step
        _, imports = measured_process([sys.executable, __file__, "--peak", "nothing", str(out)], None)
        peaks = {}
        for what in PEAKS:
            again = [
                sys.executable,
                __file__,
                "--peak",
                what,
                str(out),
                recipe,
                str(ratio or 0),
                str(self.source),
                str(self.folder),
            ]
            peaks[what] = measured_process(again, None)[1] - imports
        return peaks | {"imports": imports}


class Found(NamedTuple):
    """Plans within the same bytes for one model, and the session that can put them together."""

    session: Session
    limit: int
    plans: dict[str, Plan]
    random: list[Plan]
    random_kls: list[float]  # on held-out calibration tokens, as the searches see it
    seconds: dict[str, float]


class Plans(QPruner):
    """Cells about plans within the same bytes, pruned by 20 %, before recovery."""

    def opened(self, recipe: str, seed: int, *overrides: str) -> Session:
        alike = ("search.optimiser.smaller=0",) if recipe == "qpruner-3" and KNAPSACK not in overrides else ()
        return self.session(self.off_grid(seed), recipe, seed, ("tune=null", "prune.ratio=0.2", *alike, *overrides))

    def found(self, menu: str, seed: int) -> Found:
        """What each search finds within the same bytes and formats; what they share is made before the clock runs."""
        per, formats, scales, like_uniform = MENUS[menu]
        shared = (f"space.formats=[{formats}]", f"quant.scales={scales}")
        uniform = self.opened("qpruner-1", seed, f"quant.scales={scales}").find_plan(None)
        sessions = {
            "qpruner-2": self.opened("qpruner-2", seed, *shared, f"search.per={per}"),
            "qpruner-3": self.opened("qpruner-3", seed, *shared, f"search.per={per}"),
            "best of random": self.opened("qpruner-3", seed, *shared, f"search.per={per}", "search.engine=random"),
            "knapsack": self.opened("qpruner-3", seed, *shared, KNAPSACK),
        }
        limit = sessions["qpruner-2"].limit(None)
        if like_uniform:  # as many bytes for the blocks' weights, beside what searches keep free for longer headers
            own = variables(sessions["qpruner-3"].problem(uniform.found_by.nbytes, ready=False), per)
            held = sum(costs[[p.name for p in own.formats].index("nf4g64")] for costs in own.costs)
            limit = uniform.found_by.nbytes + held - own.limit
        plans, seconds = {"uniform": uniform}, {}
        _ = sessions["qpruner-2"].importance
        sessions["qpruner-2"].candidates.make(lambda *_: None)
        for method, session in sessions.items():
            started = time.perf_counter()
            plans[method] = session.find_plan(Budget.parse(f"{limit}B"))
            seconds[method] = round(time.perf_counter() - started, 1)
        problem = sessions["best of random"].problem(limit)
        points = known_trials(problem)
        own = variables(problem, per)
        others = list(points)[1:]  # the first is the plan by importance
        return Found(
            sessions["qpruner-3"], limit, plans, [own.plan(point, "random") for point in others],
            [points[point].kl for point in others], seconds,
        )  # fmt: skip

    def compare(self, menu: str, seed: int) -> dict:
        """KL of each plan on test text, put together from candidates: what is written is the same."""
        found = self.found(menu, seed)
        judged = self.judged(found.session, seed)
        return {
            "limit": found.limit, "seconds_each": found.seconds,
            "nbytes": {method: plan.found_by.nbytes for method, plan in found.plans.items()},
            "kl": {method: judged(plan) for method, plan in found.plans.items()},
            "random_kls": [judged(plan) for plan in found.random[:RANDOM]], "held_out_random_kls": found.random_kls,
        }  # fmt: skip

    def judged(self, session: Session, seed: int) -> Callable[[Plan], float]:
        """KL of a plan on test text."""
        windows = texts.evaluation_windows(
            self.folder / "wikitext-2" / "wiki.test.raw", load_tokenizer(self.off_grid(seed)), context=512, limit=16
        )
        probe = KLProbe(InMemoryModel(session.stream), windows, repeated=False)

        def kl(plan: Plan) -> float:
            install(probe.whole, session.layout, session.candidates, background_of(plan, session.layout))
            return probe.damage(None)

        return kl

    def estimators(self, model: str, seed: int) -> dict:
        """What importance ranks: KL of its plans and of random ones, and what 8 bits in each block alone are worth."""
        sessions = {
            name: self.opened("qpruner-2", seed, *MODELS[model], f"importance.estimator={name}") for name in ESTIMATORS
        }
        first = sessions[ESTIMATORS[0]]
        limit = first.limit(None)
        own = variables(first.problem(limit), "block")
        box = Box(costs=own.costs, values=((4.0, 8.0),) * len(own.costs), limit=own.limit)
        points = feasible_points(box, RANDOM, torch.Generator().manual_seed(seed))
        raised = [tuple(int(at == one) for at in range(len(own.costs))) for one in range(len(own.costs))]
        plans = {name: session.find_plan(Budget.parse(f"{limit}B")) for name, session in sessions.items()}
        judged = self.judged(first, seed)
        lowest = judged(own.plan(box.lowest, "lowest"))
        return {
            "kl": {name: judged(plan) for name, plan in plans.items()},
            "random_kls": [judged(own.plan(point, "random")) for point in points],
            "worth": {name: lowest - judged(own.plan(p, "one")) for name, p in zip(own.covers, raised, strict=True)},
            "lowest_kl": lowest,
            "importance": {name: {key: s.importance[key] for key in own.covers} for name, s in sessions.items()},
        }

    def ranks(self, estimator: str) -> dict:
        """How alike the order of blocks is that three samples of calibration text give."""
        own = (f"importance.estimator={estimator}",)
        found = [self.session(self.off_grid(0), "qpruner-2", seed, ("tune=null", *own)).importance for seed in SEEDS]
        blocks = [key for key in found[0] if key.count(".") == 1]
        pairs = [
            float(spearmanr([a[key] for key in blocks], [b[key] for key in blocks]).statistic)
            for a, b in combinations(found, 2)
        ]
        return {"spearman": pairs, "importance": [{key: one[key] for key in blocks} for one in found]}

    def noise(self, menu: str) -> dict:
        """KL, NLL and HellaSwag of plans within the same bytes, seed 0: what a search by accuracy would see."""
        found = self.found(menu, 0)
        folder = self.folder / "tasks"
        asked = f"search.objective={{by: accuracy, tasks: [hellaswag], data: {folder}, documents: {DOCUMENTS}}}"
        per, formats, scales, _ = MENUS[menu]
        judging = self.opened(
            "qpruner-3", 0, f"space.formats=[{formats}]", f"quant.scales={scales}", f"search.per={per}", asked
        ).judging
        order = sorted(range(len(found.random)), key=found.random_kls.__getitem__)
        spread = [found.random[order[round(at * (len(order) - 1) / 4)]] for at in range(5)]
        plans = [*found.plans.items(), *((f"random {at}", plan) for at, plan in enumerate(spread))]
        return {
            "plans": {
                name: judging.outcome(plan).model_dump() | {"nbytes": plan.found_by.nbytes} for name, plan in plans
            }
        }  # fmt: skip


def made(recipe: str, ratio: int | None) -> Path:
    """Where a recipe's directory lies between its cells."""
    return WORK / "recipes" / f"{recipe}-{ratio or 0}"


def peak(what: str, out: Path, recipe: str = "", ratio: str = "0", source: str = "", folder: str = "") -> None:
    """What a process of its own runs for its memory to be measured."""
    import peft  # noqa: F401

    if what in {"training", "checkpointed"}:
        bench = QPruner(Path(source), Path(folder), RESULTS)
        session = bench.recovering(recipe, int(ratio) or None)
        with tempfile.TemporaryDirectory() as scratch:
            recovery = session.recovery
            config = recovery.config.model_copy(update={"checkpointing": what == "checkpointed"})
            replace(recovery, config=config, states=Path(scratch)).train(out, steps=2)
    elif what == "inference":
        final_hidden(load_model(out, torch.bfloat16), torch.arange(CONTEXT))


def recipes() -> list[tuple[str, int | None]]:
    """What is run, in this order."""
    first, *rest = [(recipe, ratio) for ratio in RATIOS for recipe in RECIPES]
    return [first, *rest[:3], ("loftq-only", None), *rest[3:], *((variant, RATIOS[0]) for variant in VARIANTS)]


def key_of(recipe: str, ratio: int | None) -> str:
    return recipe if ratio is None else f"{recipe}/{ratio} %"


def name(bits: int, start: str) -> str:
    return f"start/{bits} bits/{start}" + (f" {RANK}" if start != "zeros" else "")


def write_page(results: dict) -> None:
    """Draw all tables of docs/qpruner.md."""
    parts = {
        "recipes": recipe_table, "tasks": task_table, "memory": memory_table, "cost": cost_table, "plans": plan_table,
        "noise": noise_table, "ranks": rank_table, "estimators": estimator_table, "starts": start_table,
    }  # fmt: skip
    for part, rows in parts.items():
        write_tables(PAGE, "\n" + "\n".join(rows(results)) + "\n\n", part)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def rows_of(results: dict, part: str, width: int, cells: Callable[[dict], list[str]]) -> list[list[str]]:
    """A row a recipe and ratio, in the order of ratios."""
    order = sorted(recipes(), key=lambda one: (one[1] or 0, one[0]))
    found = [(key_of(recipe, ratio), results.get(f"{part}/{key_of(recipe, ratio)}")) for recipe, ratio in order]
    return [[key, *(cells(cell) if cell else ["not run", *[""] * (width - 1)])] for key, cell in found]


def recipe_table(results: dict) -> list[str]:
    def cells(c: dict) -> list[str]:
        return [
            f"{c['nbytes'] / 1e6:.1f}", f"{c['ppl@2048']:.2f}", f"{c['ppl@128']:.2f}", f"{c['kl']:.3f}",
            f"{100 * c['top1']:.1f} %",
        ]  # fmt: skip

    rows = rows_of(results, "whole", 5, cells)
    if "whole/original" in results:
        rows.insert(0, ["original", *cells(results["whole/original"])])
    heads = ["recipe, pruned", "weight file, MB", "ppl@2048", "ppl@128", "KL", "same first choice"]
    return table(heads, rows)


def task_table(results: dict) -> list[str]:
    def cells(c: dict) -> list[str]:
        (value, error), others = c["mean"], [c["tasks"][name][0] for name in SOURCES if name != "boolq"]
        each = [f"{c['tasks'][name][0]:.1f}" for name in SOURCES]
        return [*each, f"{value:.1f} ± {error:.1f}", f"{sum(others) / len(others):.1f}"]

    rows = rows_of(results, "tasks", len(SOURCES) + 2, cells)
    for row in rows:
        recipe, _, ratio = row[0].partition("/")
        base, own = results.get(f"tasks/llm-pruner/{ratio}", {}), results.get(f"tasks/{row[0]}", {})
        base = base if recipe != "llm-pruner" else {}
        compared = "correct" in base and "correct" in own
        for left_out in ((), ("boolq",)):
            asked = [name for name in SOURCES if name not in left_out]
            gain = paired(*({name: c["correct"][name] for name in asked} for c in (own, base))) if compared else ()
            row.append("{:+.1f} ± {:.1f}".format(*gain) if gain else "answers not kept" if own and base else "")
    if "tasks/original" in results:
        rows.insert(0, ["original", *cells(results["tasks/original"]), "", ""])
    heads = ["mean", "without BoolQ", "mean, above llm-pruner", "without BoolQ"]
    return table(["recipe, pruned", *SOURCES, *heads], rows)


def paired(own: dict[str, str], base: dict[str, str]) -> tuple[float, float]:
    """Mean difference over tasks in points, and its standard error: both answer the same documents."""
    means, variances = [], []
    for task, answers in own.items():
        gains = np.array([int(a) - int(b) for a, b in zip(answers, base[task], strict=True)])
        means.append(gains.mean())
        variances.append(gains.var(ddof=1) / len(gains))
    return 100 * float(np.mean(means)), 100 * math.sqrt(sum(variances)) / len(variances)


def memory_table(results: dict) -> list[str]:
    """What fine-tuning holds: weights as they are stored without the pairs, pairs in fp32, AdamW's moments."""

    def held(c: dict) -> float:
        return (c["nbytes"] - c["adapter_nbytes"] + c["trained_nbytes"] + c["optimizer_nbytes"]) / 1e6

    rows = []
    for recipe, ratio in sorted(recipes(), key=lambda one: (one[1] or 0, one[0])):
        key = key_of(recipe, ratio)
        cell, peaks = results.get(f"whole/{key}"), results.get(f"memory/{key}")
        if cell is None:
            rows.append([key, "not run", *[""] * 7])
            continue
        base = results.get(f"whole/{key_of('llm-pruner', ratio)}") if ratio else None
        less = f"{100 * (1 - held(cell) / held(base)):.1f} %" if base and recipe != "llm-pruner" else ""
        parts = (cell["nbytes"] - cell["adapter_nbytes"], cell["trained_nbytes"], cell["optimizer_nbytes"])
        measured = [f"{peaks[what] / 1e6:.0f}" if peaks and what in peaks else "not run" for what in PEAKS]
        rows.append([key, *(f"{part / 1e6:.1f}" for part in parts), f"{held(cell):.1f}", less, *measured])
    heads = [
        "recipe, pruned", "weights, MB", "pairs", "AdamW", "sum", "below llm-pruner", "peak in recovery",
        "checkpointed", "peak in inference",
    ]  # fmt: skip
    return table(heads, rows)


def cost_table(results: dict) -> list[str]:
    def cells(c: dict) -> list[str]:
        seconds = c["stage_seconds"]
        trials = seconds.get("trials of whole plans")
        inside = {"search", "the model's own output"}  # other stages lie in the first, and the second in trials
        shared = {"the original's answers", "ranking of channels and heads", "importance of each layer"}
        return [
            f"{sum(s for stage, s in seconds.items() if stage not in inside | shared) / 60:.1f}",
            f"{seconds['recovery'] / c['steps']:.1f}",
            f"{trials / c['trials']:.1f}" if trials else "",
            f"{c['first_losses']:.3f}, {c['last_losses']:.3f}",
        ]

    heads = [
        "recipe, pruned",
        "minutes in all",
        "seconds a step",
        "seconds a trial",
        "loss of the first, last 10 steps",
    ]
    return table(heads, rows_of(results, "whole", 4, cells))


def seed_rows(
    results: dict, part: str, kinds: Iterable[str], width: int, cells: Callable[[str, int, dict], list[str]]
) -> list[list[str]]:
    """A row a kind and seed."""
    return [
        [kind, str(seed), *(cells(kind, seed, c) if (c := results.get(f"{part}/{kind}/seed {seed}"))
                            else ["not run", *[""] * (width - 1)])]
        for kind, seed in product(kinds, SEEDS)
    ]  # fmt: skip


def mean_and_sd(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def plan_table(results: dict) -> list[str]:
    def cells(_menu: str, _seed: int, c: dict) -> list[str]:
        kls = c["kl"]
        searched = [f"{kls[method]:.4f}" for method in ("best of random", "qpruner-2", "qpruner-3", "knapsack")]
        uniform = f"{kls['uniform']:.4f} ({c['nbytes']['uniform'] / 1e6:.1f} MB)"
        return [f"{c['limit'] / 1e6:.1f}", uniform, mean_and_sd(c["random_kls"]), *searched]

    rows = seed_rows(results, "plans", MENUS, 7, cells)
    heads = ["formats", "seed", "budget, MB", "uniform NF4", "random, mean ± sd", "best of 40 random"]
    return table([*heads, "qpruner-2", "qpruner-3", "knapsack"], rows)


def noise_table(results: dict) -> list[str]:
    cell = results.get(f"noise/{next(iter(MENUS))}")
    rows = []
    for name, c in sorted(cell["plans"].items(), key=lambda one: one[1]["kl"]) if cell else ():
        accuracy = f"{100 * c['accuracy']:.1f} ± {100 * c['stderr']:.1f}"
        best = min(cell["plans"].values(), key=lambda one: one["kl"])
        gain = "" if c is best else "{:+.1f} ± {:.1f}".format(*paired(*({"": o["correct"]} for o in (c, best))))
        rows.append([name, f"{c['nbytes'] / 1e6:.1f}", f"{c['kl']:.4f}", f"{c['nll']:.4f}", accuracy, gain])
    rows = rows or [["not run", *[""] * 5]]
    lines = table(["plan", "MB", "KL", "NLL", "HellaSwag, %", "above the plan of least KL"], rows)
    if cell:
        rho, low, high = agreement(list(cell["plans"].values()))
        lines += ["", f"Spearman's rho of -KL and accuracy over these plans: {rho:.2f}; documents drawn again, 90 % of "
                  f"the time {low:.2f} to {high:.2f}."]  # fmt: skip
    return lines


def agreement(plans: Sequence[dict]) -> tuple[float, float, float]:
    """Spearman's rho of -KL and accuracy, and its 5 and 95 % quantiles over documents drawn with replacement."""
    answers = np.array([[int(one) for one in plan["correct"]] for plan in plans])
    kls, rng = [-plan["kl"] for plan in plans], np.random.default_rng(0)
    drawn = [answers[:, rng.integers(answers.shape[1], size=answers.shape[1])].mean(1) for _ in range(1000)]
    low, high = np.quantile([spearmanr(kls, means).statistic for means in drawn], [0.05, 0.95])
    return float(spearmanr(kls, answers.mean(1)).statistic), float(low), float(high)


def rank_table(results: dict) -> list[str]:
    rows = []
    for estimator in ESTIMATORS:
        cell = results.get(f"ranks/{estimator}")
        rows.append([estimator, ", ".join(f"{r:.2f}" for r in cell["spearman"]) if cell else "not run"])
    return table(["estimator", "Spearman's rho of the blocks, pairs of seeds"], rows)


def estimator_table(results: dict) -> list[str]:
    """KL of plans by importance beside random ones, and how importance goes with what it should tell."""

    def cells(model: str, seed: int, c: dict) -> list[str]:
        worth = list(c["worth"].values())
        rhos = [spearmanr(list(c["importance"][name].values()), worth).statistic for name in ESTIMATORS]
        other = results.get(f"estimators/{model}/seed {(seed + 1) % len(SEEDS)}")
        alike = f"{spearmanr(worth, list(other['worth'].values())).statistic:.2f}" if other else ""
        kls = (f"{c['kl'][name]:.4f}" for name in ESTIMATORS)
        spread = f"{min(worth):.4f} to {max(worth):.4f}"
        return [mean_and_sd(c["random_kls"]), *kls, *(f"{rho:.2f}" for rho in rhos), spread, alike]

    rows = seed_rows(results, "estimators", MODELS, 7, cells)
    heads = [
        "model", "seed", "KL, random plans", *(f"by {name}" for name in ESTIMATORS),
        *(f"rho of {name} and worth" for name in ESTIMATORS), "worth of 8 bits in a block", "rho of worth, next seed",
    ]  # fmt: skip
    return table(heads, rows)


def start_table(results: dict) -> list[str]:
    rows = []
    for bits, precision in FORMATS.items():
        found = [results.get(name(bits, start)) for start in STARTS]
        rows.append([precision, *(f"{c['kl']:.4f} (ppl {c['ppl@2048']:.2f})" if c else "not run" for c in found)])
    heads = ["blocks", "zeros", *(f"{start}, rank {RANK}" for start in STARTS[1:])]
    return table(heads, rows)


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        peak(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
        return
    options = command_line(__doc__, PARTS)
    bench = Plans(options.source, options.data, RESULTS)
    if "start" in options.only:
        for bits, start in product(FORMATS, STARTS):
            bench.cell(name(bits, start), lambda b=bits, s=start: bench.start(b, s))
    if "recipes" in options.only:
        bench.cell("whole/original", bench.original)
        bench.cell("tasks/original", lambda: bench.tasks(bench.off_grid(0)))
        for recipe, ratio in recipes():
            key = key_of(recipe, ratio)
            bench.cell(f"whole/{key}", lambda r=recipe, n=ratio: bench.whole(r, n))
            bench.cell(f"memory/{key}", lambda r=recipe, n=ratio: bench.memory(r, n))
            bench.cell(f"tasks/{key}", lambda r=recipe, n=ratio: bench.tasks(made(r, n)))
    if "plans" in options.only:
        for menu in MENUS:
            for seed in SEEDS:
                bench.cell(f"plans/{menu}/seed {seed}", lambda m=menu, s=seed: bench.compare(m, s))
    if "ranks" in options.only:
        for estimator in ESTIMATORS:
            bench.cell(f"ranks/{estimator}", lambda e=estimator: bench.ranks(e))
    if "noise" in options.only:
        menu = next(iter(MENUS))
        bench.cell(f"noise/{menu}", lambda: bench.noise(menu))
    if "estimators" in options.only:
        for model in MODELS:
            for seed in SEEDS:
                bench.cell(f"estimators/{model}/seed {seed}", lambda m=model, s=seed: bench.estimators(m, s))
    write_page(bench.results)


if __name__ == "__main__":
    main()
