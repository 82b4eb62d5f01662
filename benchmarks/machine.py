"""What a result depends on besides the code: the machine and the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import mmap
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

COMPILER = os.environ.get("CXX", "g++")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine(threads: int | None = None) -> dict[str, Any]:
    """CPU, memory, versions and the date; nothing that names the machine or its users."""
    facts = _cpuinfo()
    flags = facts.get("flags", "").split()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": facts.get("model name", platform.machine()),
        "cpu_family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "instruction_sets": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "caches": caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_at_start": psutil.getloadavg()[0],
        "threads": threads or torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": (_output(COMPILER, "--version") or "not found").partition("\n")[0],
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "transformers": _version("transformers"),
        "mxfp4_fx": _version("mxfp4_fx"),
        # With a + if files differ from it.
        "commit": _output("git", "describe", "--always", "--dirty=+", "--exclude=*"),
    }


def available_bytes() -> int:
    """Memory that programs can still have."""
    return int(psutil.virtual_memory().available)


def fresh_memory_rate(size: int = 1 << 30) -> float:
    """Bytes a second at which one thread gets memory from the system, on huge pages; Linux only.

    A virtual machine may have to ask its host for memory that nothing in it has used lately.
    """
    with mmap.mmap(-1, size) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        begin = time.perf_counter()
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        return size / (time.perf_counter() - begin)


def caches() -> dict[str, int]:
    """Bytes of each cache that a core sees, such as ``{"L1d": .., "L2": .., "L3": ..}``."""
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        sizes[f"L{level}{suffix}"] = int(size.rstrip("KM")) * unit
    return sizes


def _cpuinfo() -> dict[str, str]:
    """What Linux tells of the CPU; psutil knows neither its name nor its flags."""
    path, facts = Path("/proc/cpuinfo"), dict[str, str]()
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
