"""Two hosts on one machine: network namespaces, joined by a pair of virtual network devices."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from expert_parallel import load
from loaded import logits
from torch import Tensor

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TOOLS = ("ip", "unshare", "nsenter")  # of iproute2 and util-linux
_NETWORK = 0x40000000  # CLONE_NEWNET


@contextlib.contextmanager
def hosts() -> Iterator[list[Path]]:
    """Make two hosts; their namespaces end with the context. The devices are veth0 and veth1.

    Raises:
        OSError: this machine does not let us; the message says why.
    """
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise OSError(f"{absent[0]} is not installed")
    with contextlib.ExitStack() as stack:
        keepers = []
        for _ in ADDRESSES:
            keeper = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo && exec sleep infinity"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(_end, keeper)
            assert keeper.stdout is not None
            if not keeper.stdout.readline():  # it ended
                raise OSError(keeper.communicate()[1].strip())
            keepers.append(keeper.pid)
        other = str(keepers[1])
        _in(keepers[0], "link", "add", "veth0", "type", "veth", "peer", "veth1", "netns", other)
        for number, (keeper_id, address) in enumerate(zip(keepers, ADDRESSES, strict=True)):
            _in(keeper_id, "link", "set", "lo", "up")
            _in(keeper_id, "address", "add", f"{address}/24", "dev", f"veth{number}")
            _in(keeper_id, "link", "set", f"veth{number}", "up")
        yield [Path(f"/proc/{keeper_id}/ns/net") for keeper_id in keepers]


def _in(keeper: int, *args: str) -> None:
    command = ["nsenter", "--target", str(keeper), "--net", "ip", *args]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise OSError(f"{' '.join(command)}: {ended.stderr.strip()}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def ask(namespaces: list[Path], checkpoint: Path) -> tuple[str, Tensor]:
    """Move to this rank's host, join a group over the network, and compute with all ranks.

    Returns the addresses that this process then has, and the logits of ``loaded.IDS``.
    """
    rank = dist.get_rank()
    dist.destroy_process_group()  # it found its members by a file, on the loopback device
    namespace = os.open(namespaces[rank], os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _NETWORK):
        raise OSError(ctypes.get_errno(), "setns")
    os.environ |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
    os.environ["GLOO_SOCKET_IFNAME"] = f"veth{rank}"
    dist.init_process_group("gloo")
    command = ["ip", "-brief", "address", "show", "up"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    model = load(checkpoint)
    model.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
    return shown, logits(model)
