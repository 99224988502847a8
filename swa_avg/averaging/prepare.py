"""From the names of checkpoints to an average that is planned, and to one that is written."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from swa_avg.averaging import wrapper
from swa_avg.averaging.execution import Averaging, counts_of, how_made
from swa_avg.averaging.report import Report
from swa_avg.checkpoints import Finder, StateDict, fingerprints
from swa_avg.errors import OutputError
from swa_avg.formats import Form, Headers, Layout, form_of, layout_for, open_checkpoint
from swa_avg.planning import (
    Base,
    Options,
    Paths,
    Plan,
    Rules,
    Selection,
    base_of,
    expand,
    make_plan,
    select,
    start_from,
)
from swa_avg.storage import check_remote_target, check_target, is_remote, path_of
from swa_avg.tensors import DTYPES

_FOLDERS = (Form.FOLDER, Form.DCP)
_OPENERS = 16  # URLs that are opened at once


@contextmanager
def planned(
    checkpoints: Paths, output: str | os.PathLike[str], options: Options | None = None
) -> Iterator[Averaging]:
    """Open checkpoints and plan their average; they are closed at the end of the context.

    Args:
        checkpoints: Files, or patterns of them; none where averages are merged.
        output: What to write. `.safetensors` gives safetensors; `.pt`, `.pth`, `.ckpt`,
            `.bin` and `.tar` a torch zip; another name the form of the inputs.
        options: How to average; by default with the defaults.

    Raises:
        SwaAvgError: Anything that makes the average impossible.
    """
    with ExitStack() as opened, _no_garbage() as kept:
        averaging = _planned(checkpoints, path_of(output), options or Options(), opened)
        kept()
        yield averaging


def _planned(checkpoints: Paths, target: Path, options: Options, opened: ExitStack) -> Averaging:
    """Do what `planned` does; what it opens is closed with `opened`."""
    averages = expand(_listed(options.start_from), ()) if options.start_from else []
    bases = tuple(map(base_of, _opened(averages, options, opened)))
    start_from.refuse_repeats(bases)
    given = _listed(checkpoints)
    paths = expand(given, options.choice.exclude) if given or not bases else []
    candidates = _without(_opened(paths, options, opened), bases)
    selection = Selection(())
    if candidates:
        selection = select(candidates, options.choice, by_sample=options.by_sample)
    states = [*(base.state for base in bases), *selection.chosen]
    _check_target(target, states, options)
    form = form_of(target, states[-1].checkpoint)
    strides = options.keep_wrapper or form is Form.TORCH
    rules = Rules(options.bn_buffers, DTYPES.get(options.dtype), strides)
    plan = make_plan(states, rules, counts_of(bases, selection.chosen))
    known = tuple(fingerprints(states, {}))
    said = how_made(bases, selection.chosen, options, known[len(bases) :]).text()
    plan = replace(plan, state_dict=replace(plan.state_dict, provenance=said))
    layout = _layout(form, plan, states[-1], options, opened)
    return Averaging(target, options, bases, selection, rules, plan, layout, known)


@contextmanager
def _no_garbage() -> Iterator[Callable[[], None]]:
    """Keep Python from looking for garbage where there is none: in all that headers say.

    It would look again and again while they are read, and later, in forked processes,
    copy the pages that they share.

    Yields:
        What is called once when all is read; from then on new objects are looked at.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()

    def kept() -> None:
        gc.freeze()
        if enabled:
            gc.enable()

    gc.disable()
    try:
        yield kept
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def _listed(paths: Paths) -> list[str | os.PathLike[str]]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _opened(paths: Iterable[Path], options: Options, opened: ExitStack) -> list[StateDict]:
    """Open checkpoints and find their state_dicts."""
    paths, states = list(paths), []
    # What their headers have in common is read once.
    read, finder = partial(open_checkpoint, headers=Headers()), Finder(options.key, options.ema)
    with ThreadPoolExecutor(_OPENERS) as pool:
        # A request takes its time, so URLs are opened side by side.
        side_by_side = any(map(is_remote, paths))
        for checkpoint in (pool.map if side_by_side else map)(read, paths):
            opened.callback(checkpoint.close)
            states.append(finder.find(checkpoint))
    return states


def _without(states: Sequence[StateDict], bases: Sequence[Base]) -> list[StateDict]:
    """Leave out what is an average to go on from, as a pattern for both may say."""
    taken = {_identity(base.state) for base in bases}
    return [state for state in states if _identity(state) not in taken]


def _identity(state: StateDict) -> tuple[object, ...]:
    return tuple(file.identity for file in state.checkpoint.files)


def _layout(form: Form, plan: Plan, last: StateDict, options: Options, opened: ExitStack) -> Layout:
    """Give everything its place in the output."""
    if options.keep_wrapper:
        return wrapper.layout(last, plan, lambda file: opened.callback(file.close))
    return layout_for(form, plan.state_dict, last.checkpoint, last.where, options.max_shard_size)


def _check_target(target: Path, states: Sequence[StateDict], options: Options) -> None:
    """Refuse an output that is an input, exists, or is not of the form that its name says."""
    last = states[-1]
    form = form_of(target, last.checkpoint)
    keeps = options.keep_wrapper
    if keeps and last.checkpoint.provenance:
        raise OutputError(
            "is an average, and no checkpoint is given that could be kept",
            file=last.checkpoint.path,
            remedy="Leave out --keep-wrapper",
        )
    _check_form(target, last, form, keeps, options.max_shard_size)
    files = [file for state in states for file in state.checkpoint.files]
    folder = last.checkpoint.path.is_dir() if keeps else form in _FOLDERS
    check = check_remote_target if is_remote(target) else check_target
    check(target, files, force=options.force, folder=folder)


def _check_form(
    target: Path, last: StateDict, form: Form, keep_wrapper: bool, max_shard_size: int | None
) -> None:
    """Refuse a name that says another form than the output will have, and shards of one file."""
    safe = last.checkpoint.format == "safetensors"
    unlike = last.checkpoint.path.is_dir() and form not in _FOLDERS
    if keep_wrapper and (unlike or (form is Form.SAFETENSORS and not safe)):
        raise OutputError(
            f"would not be what its name says, but like {last.checkpoint.path}",
            file=target,
            remedy="Choose a name like its own, or leave out --keep-wrapper",
        )
    if max_shard_size and (keep_wrapper or form is not Form.FOLDER):
        raise OutputError(
            "will be no Hugging Face folder, which alone is written in shards",
            file=target,
            remedy="Leave out --max-shard-size, or give such folders",
        )


def average(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Report:
    """Average checkpoints into one file.

    Each floating tensor becomes the equal-weight mean over the checkpoints
    (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization", section 3; the mean that `torch.optim.swa_utils.AveragedModel`
    keeps running), computed exactly and rounded once.

    Args:
        checkpoints: Files, or patterns of them; none where averages are merged.
        output: What to write. `.safetensors` gives safetensors; `.pt`, `.pth`, `.ckpt`,
            `.bin` and `.tar` a torch zip; another name the form of the inputs.
        threads: How many work: forked processes where this one has no other thread, else
            threads; by default one for each usable core.
        progress: Called with the number of bytes read since the last call.
        **options: The fields of `Options`, by name: `dtype="bfloat16"`.

    Returns:
        What was done.

    Raises:
        SwaAvgError: Nothing was written; the error says why.
        ValueError: An option has no such value.
    """
    with (
        planned(checkpoints, output, Options(**options)) as averaging,
        averaging.open_output() as file,
    ):
        report = averaging.write(file, threads=threads, progress=progress)
        file.commit()
    return report
