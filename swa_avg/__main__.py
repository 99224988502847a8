"""The entry point of `swa-avg`, and of `python -m swa_avg` where the script is not there.

One entry, one exit: signals are heeded before anything else is imported, and whatever
happens, the process ends here, with the code that the command line documents.
"""

from __future__ import annotations

import os
import sys

from swa_avg.signals import Signals, flush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# Where one of these is in use, others may have something to do at the end.
_WITH_OTHERS = frozenset({"swa_avg.batchnorm", "swa_avg.averaging.torchrun"})


def main() -> NoReturn:
    """Run the command, and end the process."""
    signals = Signals()
    signals.heed()
    code = 1
    try:
        code = _run(signals)
    except BaseException:
        # The one exception that a signal raises can come while another one is handled.
        if not signals.received:
            raise
        # Here, where what it holds still lives: loader workers are waited for when that goes.
        signals.leave(signals.code)
    if signals.received:
        signals.leave(signals.code)
    if code == 0 and _alone():
        # Python takes a quarter of a second to take torch apart, which is longer than it takes
        # to average small checkpoints.
        flush()
        os._exit(0)
    sys.exit(code)


def _run(signals: Signals) -> int:
    """Import the command line, run it, and return the exit code."""
    try:
        from swa_avg import cli

        code = cli.run(signals)
    finally:
        signals.end()
    return code


def _alone() -> bool:
    """Tell whether nobody else has something to do: the user's code, other ranks, threads."""
    import threading

    return _WITH_OTHERS.isdisjoint(sys.modules) and threading.active_count() == 1


if __name__ == "__main__":
    main()
