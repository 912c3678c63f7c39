"""What a cell keeps from the `run.json` of a finished job."""

from pathlib import Path
from typing import Any

from trimbit.artifact.files import weight_nbytes
from trimbit.schema.run import RUN_FILE, Run


def run_fields(folder: Path) -> dict[str, Any]:
    """Bytes, KLs, plans tried, and stages with their seconds and memory, of a compressed directory.

    `chosen_kl` is on the rows by which plans are chosen, `report_kl` on rows used for neither fitting nor choosing.
    """
    run = Run.model_validate_json((folder / RUN_FILE).read_text(encoding="utf-8"))
    return {
        "nbytes": weight_nbytes(folder), "method": run.method, "predicted_kl": run.predicted_kl,
        "chosen_kl": run.chosen_kl, "report_kl": run.report_kl,
        "calibration_digest": run.text.digest if run.text else None,
        "tried": [one.model_dump(mode="json", exclude_none=True) for one in run.tried],
        "stages": [one.model_dump(mode="json", exclude={"key"}) for one in run.stages],
    }  # fmt: skip


def held_out_kl(cell: dict[str, Any]) -> float:
    """KL on the rows by which plans are chosen; earlier code called them held out."""
    found: float = cell["held_out_kl"] if "held_out_kl" in cell else cell["chosen_kl"]
    return found
