"""Inductor's caches: no weight is in a key or in a cached artifact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

CODE = """
    import json, sys
    import torch
    from torch._dynamo.utils import counters
    from models import hidden, mlp
    torch.set_grad_enabled(False)
    module, x = mlp(seed=int(sys.argv[1])), hidden()
    out, expected = torch.compile(module, backend="mxfp4")(x)[0], module(x)[0]
    difference = (out - expected).abs().max() / expected.abs().max()
    hits = {k: v for group in ("inductor", "aot_autograd") for k, v in counters[group].items()}
    print(json.dumps({"difference": difference.item(), **hits}))
"""


def run(seed: int, cache: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CODE), str(seed)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_second_process_with_other_weights_hits_the_cache_and_is_right(tmp_path: Path) -> None:
    first, second = run(1, tmp_path), run(2, tmp_path)
    assert first.get("autograd_cache_miss", 0) == 1
    assert second.get("autograd_cache_hit", 0) == 1
    # both sides sum H and then I products in float32
    assert max(first["difference"], second["difference"]) <= 2 * (64 + 96) * 2**-24
