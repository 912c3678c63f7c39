"""A compressed directory as the commands see it: files of the right sizes, without a model."""

import json
from pathlib import Path

from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import ModelRef, Plan, Provenance
from trimbit.schema.precision import Run as Columns
from trimbit.schema.precision import parse_precision
from trimbit.schema.run import CacheRecord, Hardware, Run, StageRecord, TriedPlan, UnitRow

MODEL = ModelRef(id="tiny", config_hash="c", weights_hash="w")
PARAMETERS, NBYTES = 1_000_000, 535_000


def make_plan(**fields):
    found_by = Provenance(
        method="knapsack", recipe={}, calibration="self", measurement_hash=None, seed=0, predicted_damage=None,
        measured_damage=0.155, nbytes=NBYTES, notes=("a note of the search",),
    )  # fmt: skip
    weights = {"q": (Columns(count=4, precision=parse_precision("uint4g32")),)}
    return Plan(model=MODEL, weights=weights, found_by=found_by, **fields)


def make_run(plan, **fields):
    """A record of two units, three plans that were tried, and two stages."""
    units = (
        UnitRow(
            unit="blocks.0.attn", kept=2, size=3, formats={"q k": "uint4g32", "v": "2xbf16+2xuint2g32"}, nbytes=500_000
        ),
        UnitRow(unit="blocks.0.mlp", kept=0, size=64, formats={}, nbytes=0),
    )
    tried = (
        TriedPlan(
            name="no pruning", plan="other", nbytes=534_000, predicted_kl=0.2, estimated_kl=0.25, applied_kl=0.2612
        ),
        TriedPlan(
            name="pruning cost x1", plan=plan.content, nbytes=NBYTES, predicted_kl=0.1, estimated_kl=0.14,
            applied_kl=0.15,
        ),
    )  # fmt: skip
    stages = (
        StageRecord(stage="stats", key="1", cached=True, seconds=0.5, peak_rss_nbytes=10**9),
        StageRecord(stage="damage", key="2", cached=False, seconds=1234.0, peak_rss_nbytes=2 * 10**9),
    )
    packed = KVPrecision(bits=4, sink_tokens=0, recent_tokens=0)
    cache = CacheRecord(precision=packed, head_dim=8, heads=(2, 0), windows=(None, 9))
    given = {
        "versions": {"trimbit": "0"}, "hardware": Hardware(cpu="a cpu", instruction_sets=(), threads=1), "model": MODEL,
        "parameters": PARAMETERS, "seed": 0, "text": None, "budget": "0.54MB", "budget_nbytes": 540_000,
        "nbytes": NBYTES, "plan": plan.content, "method": "knapsack, pruning cost x1", "predicted_kl": 0.1,
        "chosen_kl": 0.15, "report_kl": 0.1554, "tried": tried, "stages": stages, "units": units, "kv_cache": cache,
    }  # fmt: skip
    return Run(**(given | fields))


def write_result(folder: Path, **fields) -> Path:
    """Write config.json, plan.json, run.json and weights of as many bytes as run.json says."""
    plan = make_plan()
    run = make_run(plan, **fields)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "trimbit"}))
    (folder / "run.json").write_text(run.model_dump_json())
    (folder / "model.safetensors").write_bytes(bytes(run.nbytes))
    (folder / "plan.json").write_text(plan.to_json())
    return folder
