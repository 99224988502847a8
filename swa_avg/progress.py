"""Progress of a run: each step reports how much of it is done, to a function of the caller.

`ProgressBar` is such a function: it shows a bar on a terminal or in a notebook.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TextIO

from swa_avg.errors import kind_of, printable


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: The name of the step: `reading headers`, `averaging`, `syncing to disk`, ….
        done: How much of the step is done.
        total: How much there is to do; None if that is unknown.
        unit: The unit of `done` and `total`: `B` for bytes, otherwise what is counted.
        samples: The number of samples that the model has seen, if the step counts batches.
    """

    step: str
    done: int = 0
    total: int | None = None
    unit: str = "B"
    samples: int = 0


Watch = Callable[[Progress], None]


class Counter:
    """Counts one step, and reports each count; it reports the start as soon as it is made.

    Args:
        watch: Called with the progress, or None.
        step: The name of the step.
        total: How much there is to do, or None.
        unit: The unit.
    """

    def __init__(
        self, watch: Watch | None, step: str, total: int | None = None, unit: str = "B"
    ) -> None:
        if watch is not None and (not callable(watch) or isinstance(watch, type)):
            raise TypeError(f"progress must be a ProgressBar() or a function, not {kind_of(watch)}")
        self._watch = watch
        self._now = Progress(step, 0, total, unit)
        self(0)

    def __call__(self, count: int, samples: int = 0) -> None:
        """Count what was done since the last call."""
        if self._watch is None:
            return
        was = self._now
        done = was.done + count
        self._now = Progress(was.step, done, was.total, was.unit, was.samples + samples)
        self._watch(self._now)


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A bar that shows the steps of a run one after the other, on stderr or in a notebook.

    ```python
    with swa_avg.ProgressBar() as bar:
        swa_avg.average("ckpts/*.pt", "swa.pt", progress=bar)
    ```

    Args:
        stream: The stream to write to; by default stderr, or the cell of a notebook.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._shown: Any = None
        self._last = Progress("")

    def __call__(self, progress: Progress) -> None:
        """Show the progress of a run."""
        last, self._last = self._last, progress
        same = (progress.total, progress.unit) == (last.total, last.unit)
        if self._shown is None or not same or progress.done < last.done:
            self._begin(progress)
        bar = self._shown
        if progress.step != last.step:
            bar.set_description_str(printable(progress.step), refresh=True)
        if progress.samples:
            elapsed = bar.format_dict["elapsed"]
            rate = f"{progress.samples / elapsed:.0f} samples/s" if elapsed else ""
            bar.set_postfix_str(rate, refresh=False)
        bar.update(progress.done - bar.n)

    def _begin(self, progress: Progress) -> None:
        """Show another step in place of the last one."""
        self.close()
        kind = _kind(self._stream)
        self._shown = kind(
            total=progress.total,
            unit=progress.unit,
            unit_scale=progress.unit == "B",
            desc=printable(progress.step),
            leave=False,
            file=self._stream,
        )

    def close(self) -> None:
        """Remove the bar."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def __exit__(self, *failure: object) -> None:
        self.close()


def _kind(stream: TextIO | None) -> Any:
    """Return the class of the bar: tqdm's for the place where it is shown."""
    import warnings
    from importlib import import_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a bar of text
        found: Any = import_module("tqdm.auto" if stream is None else "tqdm").tqdm
    # No monitor thread: a process with threads must not fork.
    return type("Bar", (found,), {"monitor_interval": 0})
