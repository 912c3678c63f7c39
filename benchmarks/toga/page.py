"""Writes the tables and pictures of docs/results/toga-q.md."""

from harness.bench import DOCS
from harness.tables import Results, origin_table, write_parts
from toga import agreement, cost, errors, full, kv, noise, options, ranks, settings, tiles
from toga.plots import draw_bits, draw_masks

PAGE = DOCS / "results" / "toga-q.md"


def parts(results: Results) -> dict[str, list[str]]:
    """All tables, by the name of their place in the page."""
    return {
        "ablation": settings.ablation_rows(results), "settings": settings.rows(results), "full": full.rows(results),
        "ratios": settings.ratio_rows(results), "search": settings.search_rows(results), "tiles": tiles.rows(results),
        "ranks": ranks.rows(results), "noise": noise.rows(results), "caches": kv.rows(results),
        "options": options.rows(results), "errors": errors.rows(results), "agreement": agreement.rows(results),
        "cost": cost.rows(results),
    }  # fmt: skip


def write(results: Results) -> None:
    """Write the tables into the page, and the pictures."""
    write_parts(PAGE, parts(results) | {"origins": origin_table(results)})
    if any(key.startswith("settings/") for key in results):
        draw_bits(results, PAGE.with_name("toga-bits.png"))
    draw_masks(results, PAGE.with_name("toga-masks.png"))
