"""Instructions to train on."""

import json

from qpruner_jobs import session
from sessions import compress


def test_instructions_mask_the_prompt(job, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": "w5 w6", "input": "w7" * (at % 2), "output": f"w{at + 8} w9"} for at in range(5)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    opened = session(
        job,
        "qpruner-1",
        "tune.loss=instruct",
        f"tune.data={data}",
        "tune.length=64",
        "tune.batch=5",
        cache=tmp_path / "c",
    )
    for row in opened.examples:
        assert int(row.loss_mask.sum()) == 3  # the output and its end
        assert bool(row.loss_mask[-3:].all())
    compress(opened, None, tmp_path / "out")
    losses = json.loads((tmp_path / "out" / "tuning.json").read_text())["losses"]
    assert losses[-1] < losses[0]
