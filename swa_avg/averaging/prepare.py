"""From the names of checkpoints to an average that is planned, and to one that is written."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from swa_avg.averaging import wrapper
from swa_avg.averaging.execution import Averaging, counts_of, how_made
from swa_avg.averaging.report import Report
from swa_avg.checkpoints import StateDict, check_choice, check_running, fingerprints
from swa_avg.errors import OutputError
from swa_avg.formats import Components, Form, Layout, form_of, layout_for
from swa_avg.planning import (
    Base,
    Inputs,
    Opened,
    Options,
    Paths,
    Plan,
    Rules,
    Selection,
    base_of,
    expand,
    find_inputs,
    make_plan,
    open_all,
    refuse_unlike,
    select,
    start_from,
)
from swa_avg.storage import (
    check_remote_target,
    check_target,
    is_remote,
    path_of,
)
from swa_avg.tensors import DTYPES

# Of files that others write: a name that promises what is not in the file.
_OTHERS = (
    *(".onnx", ".h5", ".hdf5", ".keras", ".gguf", ".ggml", ".npz", ".npy", ".tflite", ".msgpack"),
    *(".pb", ".mlmodel", ".mlpackage", ".pdparams", ".engine", ".trt", ".mar", ".nemo", ".distcp"),
    *(".pt2", ".pte", ".ptl", ".torchscript", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z"),
    *(".json", ".yaml", ".yml", ".txt", ".csv", ".log", ".py", ".png", ".svg", ".html"),
)
_FOLDERS = (Form.FOLDER, Form.DCP)
_ALONE = "only one checkpoint takes part: nothing is averaged, its weights are the output's"


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
        _check_kind(output, averaging)
        kept()
        yield averaging


def _check_kind(output: str | os.PathLike[str], averaging: Averaging) -> None:
    """Refuse an output that is written as the name of a folder, where it is a file.

    Args:
        output: The output as the user wrote it.
        averaging: What is averaged.

    Raises:
        OutputError: It ends in a slash, and what is averaged becomes a file.
    """
    text = output if isinstance(output, str) else ""
    if not text.endswith(("/", os.sep)) or averaging.is_folder:
        return
    raise OutputError(
        "is the name of a folder, and these checkpoints are averaged into a file",
        file=text,
        remedy=f"Name the file, as in -o {text.rstrip('/' + os.sep)}.pt",
    )


def _planned(checkpoints: Paths, target: Path, options: Options, opened: ExitStack) -> Averaging:
    """Do what `planned` does; what it opens is closed with `opened`."""
    averages = expand(_listed(options.start_from)) if options.start_from else []
    bases = tuple(map(base_of, _opened(Inputs(averages), options, opened).states))
    start_from.refuse_repeats(bases)
    given = _listed(checkpoints)
    inputs = find_inputs(given, options.choice.exclude) if given or not bases else Inputs()
    found = _opened(inputs, options, opened)
    candidates = _without(found.states, bases)
    selection = Selection(())
    if candidates:
        selection = select(candidates, options.choice, by_sample=options.by_sample)
    alone = [_ALONE] if not bases and len(selection.chosen) == 1 else []
    selection = replace(selection, notes=(*found.notes, *selection.notes, *alone))
    states = [*(base.state for base in bases), *selection.chosen]
    check_running(selection.chosen, options.ema)
    _check_target(target, states, options)
    form = form_of(target, states[-1].checkpoint)
    strides = options.keep_wrapper or form is Form.TORCH
    rules = Rules(options.bn_buffers, DTYPES.get(options.dtype), strides, options.keep_wrapper)
    plan = make_plan(states, rules, counts_of(bases, selection.chosen))
    refuse_unlike(plan.tensors, states)
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


def _opened(inputs: Inputs, options: Options, opened: ExitStack) -> Opened:
    """Open inputs and find their state_dicts."""
    return open_all(inputs, options.key, options.ema, opened) if inputs.paths else Opened()


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
    if keeps:
        check_choice(last, options.key, options.ema)
    _check_suffix(target)
    _check_form(target, last, form, keeps, options.max_shard_size)
    files = [file for state in states for file in state.checkpoint.files]
    folder = last.checkpoint.path.is_dir() if keeps else form in _FOLDERS
    check = check_remote_target if is_remote(target) else check_target
    check(target, files, force=options.force, folder=folder)


def _check_suffix(target: Path) -> None:
    """Refuse a name that promises a file of another kind than are written here."""
    if target.suffix.lower() in _OTHERS:
        name = target.name[: -len(target.suffix)]
        raise OutputError(
            f"ends in {target.suffix}, and no such file is written here",
            file=target,
            remedy=f"Name it {name}.pt or {name}.safetensors",
        )


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
    several = isinstance(last.checkpoint.tree, Components) and " + " in last.where
    if several and form not in _FOLDERS:
        names = last.where.split(" + ")
        raise OutputError(
            f"is one file, and {last.checkpoint.path} has several models ({', '.join(names)})",
            file=target,
            remedy=f"Name a folder, as in -o swa, or take one model with --key {names[-1]}",
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
        notes = file.commit()
    return replace(report, notes=(*report.notes, *notes))
