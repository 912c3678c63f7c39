"""The model card of a compressed directory."""

from importlib.metadata import version
from pathlib import Path

from trimbit.model.layout import Layout
from trimbit.schema.plan import Plan

TEXTS = {"self": "text sampled from the model itself", "builtin": "the text that comes with trimbit"}


def model_card(model_id: str, license_name: str | None, layout: Layout, plan: Plan, calibration: str) -> str:
    """The text of README.md in a compressed directory."""
    found, nbytes = plan.found_by, plan.found_by.nbytes
    license_line = f"license: {license_name}\n" if license_name else ""
    damage = f"{found.measured_damage:.4f} nats a token" if found.measured_damage is not None else "not measured"
    cache = f" Keys and values are cached in {plan.kv_cache.label}." if plan.kv_cache is not None else ""
    text = TEXTS.get(calibration, Path(calibration).name)
    return (
        f"---\nbase_model: {model_id}\nlibrary_name: trimbit\n{license_line}"
        "tags: [trimbit, quantized, pruned]\n---\n\n"
        f"# {model_id}, {nbytes / 1e6:.1f} MB\n\n"
        f"Compressed with trimbit {version('trimbit')}: {found.method}. Weight file {nbytes:,} bytes, "
        f"{8 * nbytes / layout.parameters:.2f} bits per original parameter; "
        f"KL to the original on held-out calibration text: {damage}.\n"
        f"Calibrated on {text}, seed {found.seed}.{cache}\n\n"
        "```python\nimport trimbit  # makes transformers know this format\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this directory")\n```\n\n'
        "`plan.json` says what was cut and how many bits each weight has, `recipe.yaml` how that was decided.\n"
    )
