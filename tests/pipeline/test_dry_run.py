"""Dry runs."""

from qpruner_jobs import session
from trimbit.pipeline.dry_run import estimate


def test_a_dry_run_counts_recovery_and_needs_no_budget(job, tmp_path):
    def minutes(steps):
        rows = dict(estimate(session(job, "qpruner-1", f"tune.steps={steps}", cache=tmp_path), None))
        return int(rows["time"].split()[1])

    assert minutes(10**9) > minutes(1) + 60
    assert not any(tmp_path.iterdir())
