"""Floors: the rate at which this machine reads memory and multiplies, measured beside the rest.

``probes.cpp`` is compiled for this CPU into a temporary directory. torch must be imported before it
is loaded: the two then share one OpenMP runtime, hence one pool of threads.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch  # noqa: F401  (first, for its OpenMP runtime)

from benchmarks.machine import COMPILER
from benchmarks.timing import summary

SOURCE = Path(__file__).with_name("probes.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")

# Units that multiply, and the instruction of each: the best of them is the machine's matrix peak.
UNITS = {
    "f32": "float32 FMA",
    "avx512_bf16": "vdpbf16ps",
    "amx_bf16": "AMX bf16",
    "amx_bf16_registers": "without tile loads",
}
NO_PEAK = "amx_bf16_registers"  # no matmul reaches it, for it has tiles to load
# (streams a thread, bytes of prefetch ahead); which is best depends on the machine.
VARIANTS = tuple((streams, ahead) for streams in (1, 2, 4, 8, 16) for ahead in (0, 512, 1024, 2048))
KEPT_VARIANTS = 2  # of those, the best are measured every time
CHUNK = 4 << 20  # what probes.cpp reads at a time


class ProbesUnavailable(Exception):
    """The probes could not be built or have no memory; the message says why."""


class Rates(NamedTuple):
    """One measurement of the floors, beside contenders at T = ``tokens``."""

    tokens: int
    read: float  # bytes a second
    units: dict[str, float]  # FLOP a second

    @property
    def peak(self) -> float:
        return max(rate for unit, rate in self.units.items() if unit != NO_PEAK)


class Probes:
    """Measures the floors once at each :meth:`measure`.

    Args:
        threads: the same number as the contenders have.
        buffer_bytes: how much memory is read; choose several times the last cache.
        seconds: how long each unit is kept busy.
    """

    def __init__(self, threads: int, buffer_bytes: int, seconds: float = 0.05) -> None:
        self.threads, self.seconds = threads, seconds
        self.bytes = max(buffer_bytes // CHUNK, 1) * CHUNK
        self._library = _build()
        self._data = self._library.probe_allocate(self.bytes, threads)
        if not self._data:
            raise ProbesUnavailable(f"no {self.bytes / 1e9:.1f} GB of memory to read")
        self.rates: list[Rates] = []
        rates = {variant: max(self._read(variant) for _ in range(3)) for variant in VARIANTS}
        self.variants = sorted(VARIANTS, key=lambda variant: -rates[variant])[:KEPT_VARIANTS]

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.probe_free(self._data)
        self._data = None

    def measure(self, tokens: int) -> None:
        """Measure every floor once more, beside contenders at T = ``tokens``."""
        read = max(self._read(variant) for variant in self.variants)
        units = {
            unit: getattr(self._library, f"probe_{unit}")(self.threads, self.seconds)
            for unit in UNITS
        }
        here = {unit: rate for unit, rate in units.items() if rate > 0}
        self.rates.append(Rates(tokens, read, here))

    def beside(self, tokens: int) -> tuple[float, float]:
        """Bytes and floating-point operations a second: medians of what was measured beside T.

        If nothing was, of everything.
        """
        rates = [each for each in self.rates if each.tokens == tokens] or self.rates
        return (
            statistics.median(each.read for each in rates),
            statistics.median(each.peak for each in rates),
        )

    def data(self) -> dict[str, Any]:
        """Bytes and floating-point operations a second; the peak is that of the best unit.

        ``tokens`` tells beside which T each sample was measured.
        """
        return {
            "tokens": [each.tokens for each in self.rates],
            "read": {
                **summary([each.read for each in self.rates]),
                "buffer_bytes": self.bytes,
                "variants": [{"streams": s, "prefetch_bytes": a} for s, a in self.variants],
            },
            "units": {
                unit: summary([each.units[unit] for each in self.rates])
                for unit in self.rates[0].units
            },
            "matrix_peak": summary([each.peak for each in self.rates]),
        }

    def _read(self, variant: tuple[int, int]) -> float:
        streams, ahead = variant
        rate: float = self._library.probe_read(self._data, self.bytes, self.threads, streams, ahead)
        return rate


def _build() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, "probes.so")
        command = [COMPILER, *FLAGS, str(SOURCE), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            raise ProbesUnavailable(f"no C++ compiler: {COMPILER} not found; set CXX") from None
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise ProbesUnavailable(f"{COMPILER} could not compile {SOURCE.name}: {error}")
        library = ctypes.CDLL(str(built))  # stays mapped when the file is gone
    library.probe_allocate.restype = ctypes.c_void_p
    library.probe_allocate.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.probe_free.restype = None
    library.probe_free.argtypes = [ctypes.c_void_p]
    library.probe_read.restype = ctypes.c_double
    integers = (ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    library.probe_read.argtypes = [ctypes.c_void_p, *integers]
    for unit in UNITS:
        probe = getattr(library, f"probe_{unit}")
        probe.restype, probe.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_double]
    return library
