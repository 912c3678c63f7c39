"""Runs experiments cell by cell, and writes the pages that show them.

    python benchmarks/run.py main.budgets --data DATA          one experiment
    python benchmarks/run.py main qpruner toga --data DATA     all of them
    python benchmarks/run.py main --list                       the cells, which are missing, and the expected time
    python benchmarks/run.py main qpruner toga --pages         the pages alone, from the stored cells

Each cell is stored in `benchmarks/results/GROUP.json` as soon as it is done, and one that is there is not run again.
"""

from trimbit.jobs.threads import share_cores

if __name__ == "__main__":
    share_cores()  # before torch is loaded
    from harness.cli import main

    main(__doc__)
