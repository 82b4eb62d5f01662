"""macOS and Windows, as far as Linux can show them: other names of the system, and no POSIX.

The packages that this one uses are imported before, as they are on Linux.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PRETEND = """
import os, sys
from importlib.machinery import PathFinder

import filelock, numpy, tqdm, torch, torch._dynamo

system = {system!r}
if system == "win32":
    from transformers import GptOssForCausalLM
    import transformers.quantizers
    import torch._inductor.compile_fx

    absent = {{"fcntl", "grp", "pwd", "resource", "termios"}}
    find = PathFinder.find_spec

    def find_spec(name, *args, **kwargs):
        return None if name.partition(".")[0] in absent else find(name, *args, **kwargs)

    PathFinder.find_spec = find_spec
    for name in absent:
        sys.modules.pop(name, None)
    names = "fork geteuid getuid killpg posix_fadvise register_at_fork sched_getaffinity sysconf"
    for name in (*names.split(), "RTLD_NOLOAD", "RTLD_NOW", "O_NOFOLLOW"):
        delattr(os, name)
sys.platform = system
"""
ASK = """
import mxfp4_fx

for name in mxfp4_fx.__all__:
    if "transformers" in sys.modules or "huggingface" not in mxfp4_fx._MODULES.get(name, ""):
        getattr(mxfp4_fx, name)
from mxfp4_fx import doctor

doctor.self_check.__defaults__ = ("eager",)  # Inductor would look for that system's compiler
from mxfp4_fx.cli import main

sys.exit(main(["doctor", "--device", "cpu"]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_experts_run_in_pytorch(system: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PRETEND.format(system=system) + ASK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "cpu: pytorch kernels, layout row_major: " in ended.stdout
    assert f"the CPU kernels run on Linux only, and this is {system}" in ended.stdout
    assert "SlowKernelsWarning" in ended.stderr
    assert ended.stdout.endswith("usable: cpu\n")
