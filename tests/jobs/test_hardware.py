"""What is said of the machine is so."""

import os

import torch

from trimbit.jobs.hardware import PeakMemory, hardware, resident_nbytes
from trimbit.jobs.threads import SPINS, share_cores


def test_the_machine_is_named_with_its_instruction_sets():
    found = hardware()
    assert found.cpu
    assert found.threads == torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in {"AVX2", "AVX512"}:
        assert {"AVX2": "avx2", "AVX512": "avx512f"}[capability] in found.instruction_sets


def test_peak_memory_sees_what_was_held_and_let_go():
    before = resident_nbytes()  # of what tests before this one left
    with PeakMemory() as busy:
        held = torch.ones(64, 2**20)  # 268 MB
        del held
    assert busy.nbytes > before + 200e6


def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
