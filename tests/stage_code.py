"""Digests of the code behind each stage, by which a forgotten version is noticed.

`PYTHONPATH=benchmarks python tests/stage_code.py` writes the snapshot anew.
"""

import hashlib
import json
from pathlib import Path

import trimbit
from harness.origin import bare_code
from trimbit.jobs.stages import StageKey
from trimbit.pipeline import keys

ROOT = Path(trimbit.__file__).parent
SNAPSHOT = Path(__file__).parent / "snapshots" / "stages.json"
CODE = {  # what makes each result, below src/trimbit
    "text": ("calibrate/sample.py", "calibrate/text.py", "model/forward"),
    "moments": ("calibrate/stats.py", "calibrate/moments.py", "calibrate/taps.py", "model/forward"),
    "ranking": (
        "measure/ranking.py",
        "measure/criteria",
        "calibrate/backward.py",
        "calibrate/gradients.py",
        "calibrate/inverse.py",
    ),
    "importance": ("measure/layer_importance.py", "measure/criteria", "model/forward"),
    "candidates": ("trial/candidates.py", "transform", "kernels", "model/channels.py", "model/resolved.py"),
    "damage": ("measure/damage.py", "measure/kl_probe.py", "measure/choices.py", "model/forward"),
    "predicted": (
        "calibrate/backward.py",
        "calibrate/sensitivity.py",
        "measure/predict.py",
        "measure/choices.py",
        "trial/expected.py",
        "trial/candidates.py",
        "transform/quant",
        "transform/repair/refit.py",
        "model/forward",
    ),
    "corrected": ("measure/corrected.py", "measure/variants.py", "trial/candidates.py", "model/forward"),
    "teacher": ("calibrate/teacher.py", "model/forward"),
    "applied": (
        "transform",
        "kernels",
        "model/forward",
        "model/channels.py",
        "model/resolved.py",
        "calibrate/moments.py",
        "calibrate/teacher.py",
    ),
    "pairs": ("recover/tune.py", "recover/recovery.py", "runtime/layers.py"),
    "outcomes": ("measure/kl_probe.py", "evaluate/lm_eval.py", "recover"),
    "shares": ("trial/masked",),
    "plan": ("search", "measure/choices.py", "trial/masked"),
}


def stages():
    """All stage keys, by their stage."""
    found = vars(keys).values()
    kinds = [one for one in found if isinstance(one, type) and issubclass(one, StageKey) and one is not StageKey]
    return {kind.stage: kind for kind in kinds}


def code_digest(*parts):
    """Of the code without comments, docstrings and layout."""
    files = sorted(
        {file for part in parts for file in ((ROOT / part).rglob("*.py") if "." not in part else [ROOT / part])}
    )
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(ROOT)}\n{bare_code(file)}".encode())
    return total.hexdigest()[:16]


def current():
    """Version and code of every stage as they are now."""
    return {name: {"version": kind.version, "code": code_digest(*CODE[name])} for name, kind in stages().items()}


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
