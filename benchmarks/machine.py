"""What a result depends on besides the code: the machine and the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from probes import compiler_version

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> dict[str, Any]:
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
        "memory_bytes": _meminfo("MemTotal"),
        "load_average_at_start": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": compiler_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "transformers": _version("transformers"),
        "mxfp4_fx": _version("mxfp4_fx"),
        "commit": _commit(),
    }


def caches() -> dict[str, int]:
    """Bytes of each cache that a core sees, such as ``{"L1d": .., "L2": .., "L3": ..}``."""
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        sizes[f"L{level}{suffix}"] = int(size.rstrip("KM")) * unit
    return sizes


def available_bytes() -> int | None:
    """Memory that programs can still have; None if the system does not tell."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _cpuinfo() -> dict[str, str]:
    facts: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return facts
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is measured, with a + if files differ from it."""
    here = Path(__file__).parent
    try:
        name, changes = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True)
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")
