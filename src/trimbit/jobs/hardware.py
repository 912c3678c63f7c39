"""The hardware that a job runs on, and the memory that it takes."""

import platform
import resource
import threading
from pathlib import Path
from types import TracebackType

import torch

from trimbit.schema.run import Hardware

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # that matrix products may use
SECONDS = 0.05  # between two samples of the memory


def hardware() -> Hardware:
    """The processor, its instruction sets in `INSTRUCTION_SETS`, the number of threads, and the GPU if there is one."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
        }
        name = fields.get("model name", name)
        flags = set(fields.get("flags", "").split())
    return Hardware(
        cpu=name,
        instruction_sets=tuple(one for one in INSTRUCTION_SETS if one in flags),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


class PeakMemory:
    """The peak resident memory of this process during a `with` block, in bytes.

    The system keeps one high-water mark for the life of the process. If the block does not raise it, the peak is that
    of samples taken while the block ran.
    """

    def __enter__(self) -> "PeakMemory":
        self.nbytes = resident_nbytes()
        self._before = peak_nbytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SECONDS):
            self.nbytes = max(self.nbytes, resident_nbytes())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        after = peak_nbytes()
        self.nbytes = after if after > self._before else max(self.nbytes, resident_nbytes())


def resident_nbytes() -> int:
    """Resident memory now, in bytes; the peak so far on systems without /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_nbytes()


def peak_nbytes() -> int:
    """The peak resident memory of this process so far, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
