"""Work in a thread, whose result may be wanted later, or by nobody."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from processes import LAST_RESORT, wait_until

from mxfp4_fx.core import background


class Owner:
    """Somebody who wants a result."""


def test_the_result_is_waited_for() -> None:
    owner = Owner()
    assert background.begin(lambda is_stopped: 5, owner)() == 5


def test_an_error_comes_to_who_waits() -> None:
    owner = Owner()
    result = background.begin(lambda is_stopped: [][0], owner)
    with pytest.raises(IndexError):
        result()


def test_work_is_stopped_when_its_owner_is_gone() -> None:
    def work(is_stopped: Callable[[], bool]) -> str:
        wait_until(is_stopped, "a stop")
        return "stopped"

    owner = Owner()
    result = background.begin(work, owner)
    del owner
    assert result() == "stopped"


ENDS = """
import sys
from mxfp4_fx.core import background
class Owner: pass
owner = Owner()
def work(is_stopped):
    while not is_stopped():
        pass
background.begin(work, owner)
"""


def test_the_interpreter_need_not_wait_for_a_result() -> None:
    subprocess.run([sys.executable, "-c", ENDS], check=True, timeout=LAST_RESORT)
