"""From paths of checkpoints to a planned average (`planned`) or a written one (`average`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from swa_avg.averaging.computing import no_garbage
from swa_avg.averaging.destination import Destination
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.origin import counts_of, how_made
from swa_avg.averaging.report import Report
from swa_avg.checkpoints import StateDict, check_running, fingerprints
from swa_avg.errors import OutputError, SelectionError
from swa_avg.planning import (
    Base,
    Inputs,
    Opened,
    OptionFields,
    Options,
    Paths,
    Selection,
    base_of,
    check_arguments,
    expand,
    find_inputs,
    listed_paths,
    make_plan,
    open_all,
    options_of,
    refuse_unlike,
    select,
    start_from,
    with_block,
)
from swa_avg.progress import Counter, Watch
from swa_avg.storage import path_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from swa_avg.batchnorm import BatchNorm

_ALONE = "only one checkpoint takes part: nothing is averaged; the output has its weights"


@with_block
def planned(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    options: Options | None = None,
    *,
    progress: Watch | None = None,
    **named: Unpack[OptionFields],
) -> Iterator[Averaging]:
    """Open checkpoints and plan their average; they are closed at the end of the context.

    Only headers are read. `write` of the plan computes the average and writes it:

    ```python
    with swa_avg.planned("ckpts/epoch_*.pt", "swa.pt", dtype="bfloat16") as plan:
        print(plan.notes)
        report = plan.write()
    ```

    Args:
        checkpoints: Files, folders or patterns; none to merge the averages of `start_from`.
        output: The output. `.safetensors` selects safetensors; `.pt`, `.pth`, `.ckpt`, `.bin`
            and `.tar` select a torch zip; any other name keeps the format of the inputs.
        options: The options of the average, as one object; or give them by name.
        progress: Called with a `Progress` as the headers are read.
        **named: The fields of `Options`, by name.

    Raises:
        SwaAvgError: The checkpoints cannot be averaged, or the output cannot be written.
        TypeError: An option has an unknown name, or options are given twice.
        ValueError: An option has an invalid value.
    """
    if options is not None and named:
        raise TypeError("planned() takes its options as one object or by name, not both")
    options = options or options_of(planned, named)
    target = path_of(output)
    with ExitStack() as opened, no_garbage() as kept:
        bases, selection = gathered(checkpoints, options, opened, progress)
        averaging = average_of(target, bases, selection, options, opened)
        check_kind(output, averaging)
        kept()
        yield averaging


def check_kind(output: str | os.PathLike[str], averaging: Averaging) -> None:
    """Refuse an output that ends in a slash if the average is a file.

    Args:
        output: The output as the user gave it.
        averaging: The planned average.

    Raises:
        OutputError: The output ends in a slash, and the average is a file.
    """
    text = output if isinstance(output, str) else ""
    if not text.endswith(("/", os.sep)) or averaging.is_folder:
        return
    raise OutputError(
        "is the name of a folder, but the average of these checkpoints is a file",
        file=text,
        remedy=f"Name the file, as in -o {quote(text.rstrip('/' + os.sep) + '.pt')}",
    )


def gathered(
    checkpoints: Paths, options: Options, opened: ExitStack, progress: Watch | None
) -> tuple[tuple[Base, ...], Selection]:
    """Open the inputs and choose among the checkpoints; `opened` closes the files.

    Args:
        checkpoints: As for `planned`.
        options: The options of the average.
        opened: Closes the files.
        progress: Called with a `Progress` as the headers are read.

    Returns:
        The averages of `start_from` and `minus`, and the chosen checkpoints.
    """
    given = listed_paths(checkpoints)
    bases = _bases(options, opened, progress)
    if options.minus is not None and given:
        raise ValueError("minus cannot be combined with checkpoints, only with start_from")
    inputs = find_inputs(given, options.choice.exclude) if given or not bases else Inputs()
    found = _opened(inputs, options, opened, progress)
    candidates = _without(found.states, bases)
    selection = Selection(())
    Counter(progress, "comparing checkpoints")
    if candidates:
        selection = select(candidates, options.choice, by_sample=options.by_sample)
    more = start_from.amplification(bases)
    return bases, replace(selection, notes=(*found.notes, *selection.notes, *more))


def average_of(
    target: Path,
    bases: tuple[Base, ...],
    selection: Selection,
    options: Options,
    opened: ExitStack,
    others: Sequence[StateDict] = (),
) -> Averaging:
    """Plan the average of opened inputs.

    Args:
        target: The path of the output.
        bases: The averages of `start_from` and `minus`.
        selection: The checkpoints.
        options: The options of the average.
        opened: Closes files that the output is copied from.
        others: Further checkpoints, which the output must not replace.
    """
    if not bases and len(selection.chosen) == 1 and not others:
        selection = replace(selection, notes=(*selection.notes, _ALONE))
    states = [*(base.state for base in bases), *selection.chosen]
    if options.minus is None:
        check_running(states)
    destination = Destination(target, states[-1], options)
    destination.check(file for state in (*states, *others) for file in state.checkpoint.files)
    rules = destination.rules
    plan = make_plan(states, rules, counts_of(bases, selection.chosen))
    refuse_unlike(plan.tensors, states)
    known = tuple(fingerprints(states, {}))
    provenance = how_made(bases, selection.chosen, options, known[len(bases) :]).text()
    plan = replace(plan, state_dict=replace(plan.state_dict, provenance=provenance))
    layout = destination.layout(plan, opened)
    return Averaging(target, options, bases, selection, rules, plan, layout, known)


def _bases(options: Options, opened: ExitStack, progress: Watch | None) -> tuple[Base, ...]:
    """Open the averages of `start_from` and `minus`; a subtracted one comes first."""

    def read(paths: Paths) -> tuple[Base, ...]:
        inputs = Inputs(expand(listed_paths(paths)))
        return tuple(map(base_of, _opened(inputs, options, opened, progress).states))

    bases = read(options.start_from) if options.start_from else ()
    if options.minus is None:
        start_from.refuse_repeats(bases)
        return bases
    parts = read(options.minus)
    for option, averages in (("--start-from", bases), ("--minus", parts)):
        if len(averages) != 1:
            raise SelectionError(
                f"one average is subtracted from one, but {len(averages)} are given with {option}",
                remedy=f"Give one file with {option}",
            )
    return start_from.minus(bases[0], parts[0])


def _opened(inputs: Inputs, options: Options, opened: ExitStack, progress: Watch | None) -> Opened:
    """Open inputs and find their state_dicts."""
    if not inputs.paths:
        return Opened()
    return open_all(inputs, options.key, options.ema, opened, progress)


def _without(states: Sequence[StateDict], bases: Sequence[Base]) -> list[StateDict]:
    """Leave out the averages of `start_from`, which a pattern for checkpoints may match."""
    taken = {_identity(base.state) for base in bases}
    return [state for state in states if _identity(state) not in taken]


def _identity(state: StateDict) -> tuple[object, ...]:
    return tuple(file.identity for file in state.checkpoint.files)


def average(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    *,
    batchnorm: BatchNorm | None = None,
    threads: int | None = None,
    progress: Watch | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Average checkpoints into one file, and recompute BatchNorm if `batchnorm` is given.

    Each floating tensor becomes the equal-weight mean over the checkpoints
    (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization", section 3; the mean that `torch.optim.swa_utils.AveragedModel`
    computes during training). The mean is computed exactly and rounded once.

    Args:
        checkpoints: Files, folders or patterns; none to merge the averages of `start_from`.
        output: The output. `.safetensors` selects safetensors; `.pt`, `.pth`, `.ckpt`, `.bin`
            and `.tar` select a torch zip; any other name keeps the format of the inputs.
        batchnorm: The batches and the model with which to recompute the BatchNorm statistics
            of the average: `BatchNorm(data=loader, model=network)`.
        threads: The number of workers; by default one per usable core. Workers are forked
            processes if this process has no other thread, otherwise threads.
        progress: Called with a `Progress` at the start of each step and as it proceeds; a
            `ProgressBar` shows it.
        **options: The fields of `Options`, by name: `dtype="bfloat16"`.

    Returns:
        The report.

    Raises:
        SwaAvgError: Averaging failed, and nothing was written.
        TypeError: An option has an unknown name.
        ValueError: An option has an invalid value.
    """
    wanted = options_of(average, options)
    check_arguments(batchnorm, threads)
    with planned(checkpoints, output, wanted, progress=progress) as plan:
        return plan.write(batchnorm=batchnorm, threads=threads, progress=progress)
