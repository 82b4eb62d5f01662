"""Bytes that this process has sent, as Linux counts them, and that it should have sent."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from typing import Any

from benchmarks import scaling_model
from mxfp4_fx.checkpoints import gpt_oss

_ACKNOWLEDGED = 120  # where struct tcp_info of <linux/tcp.h> has tcpi_bytes_acked


def sent_bytes() -> int:
    """Bytes that the other ends of all TCP connections of this process have acknowledged."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no TCP socket, or closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(told) >= _ACKNOWLEDGED + 8:
                total += struct.unpack_from("Q", told, _ACKNOWLEDGED)[0]
    return total


def expected_bytes(config: dict[str, Any], ranks: int, tokens: int, forwards: int) -> int:
    """Bytes that a rank sends while a model with an all-reduce in each layer runs in bfloat16.

    Args:
        config: the checkpoint's.
        ranks: that share the experts, and the head, whose logits transformers gathers.
        tokens: of all forwards together.
        forwards: each of which computes the logits of one token.
    """
    size = scaling_model.FLOAT
    hidden, layers = config["hidden_size"], config[gpt_oss.LAYERS]
    reduced = tokens * layers * hidden * size * 2 * (ranks - 1) / ranks
    gathered = forwards * config["vocab_size"] * size * (ranks - 1) / ranks
    return round(reduced + gathered)
