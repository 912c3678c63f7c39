"""How the threads of a matrix product wait for one another."""

import os

SPINS = "5000"  # ours; GCC's default is some 300,000


def share_cores() -> None:
    """Let threads sleep soon when they wait, unless the user says how long they spin. Called before torch is loaded.

    On a machine where other programs run, threads that spin take the cores that those they wait for need. On a free
    machine, fewer spins than these slow GPTQ down.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
