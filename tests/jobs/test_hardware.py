"""What is said of the machine is so."""

import torch

from trimbit.jobs.hardware import PeakMemory, hardware


def test_the_machine_is_named_with_its_instruction_sets():
    found = hardware()
    assert found.cpu
    assert found.threads == torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in {"AVX2", "AVX512"}:
        assert {"AVX2": "avx2", "AVX512": "avx512f"}[capability] in found.instruction_sets


def test_peak_memory_sees_what_was_held_and_let_go():
    with PeakMemory() as idle:
        pass
    with PeakMemory() as busy:
        held = torch.ones(64, 2**20)  # 268 MB
        del held
    assert busy.nbytes > idle.nbytes + 200e6
