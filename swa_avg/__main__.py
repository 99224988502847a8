"""The entry point of the `swa-avg` script and of `python -m swa_avg`.

Signal handlers are installed before anything else is imported. The process always ends in
this module, with one of the documented exit codes.
"""

from __future__ import annotations

import os
import sys

from swa_avg.signals import Signals, flush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# Once one of these is imported, the user's code or another rank may have work left at exit.
_RUN_OTHER_CODE = frozenset({"swa_avg.batchnorm", "swa_avg.averaging.torchrun"})


def main() -> NoReturn:
    """Run the command and end the process."""
    signals = Signals()
    signals.install()
    code = 1
    try:
        code = _run(signals)
    except BaseException:
        # A signal may raise its exception while another exception is handled.
        if not signals.received:
            raise
        # Leave inside the handler, which keeps the frames alive: a DataLoader that is freed
        # waits for its workers.
        signals.leave(signals.code)
    if signals.received:
        signals.leave(signals.code)
    if code == 0 and _nothing_left():
        # Python takes a quarter of a second to unload torch. Averaging small checkpoints takes
        # less.
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


def _nothing_left() -> bool:
    """Return whether no other code has work left: the user's code, other ranks, threads."""
    import threading

    other = any(name in sys.modules for name in _RUN_OTHER_CODE)
    return not other and threading.active_count() == 1


if __name__ == "__main__":
    main()
