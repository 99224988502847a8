"""Checks of the command line: options that cannot be combined are refused. Does not print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from swa_avg.cli import ranks
from swa_avg.cli.options import BATCHNORM

_CHOICE = ("last", "epochs", "best", "metric", "mode", "exclude")
_OF_CHECKPOINTS = (*_CHOICE, "bn_buffers", "keep_wrapper", "distances")
_OF_AVERAGING = ("dtype", "max_shard_size", "threads", "dry_run", "verify")
_LEAVE_OUT = "Leave out one of them."


def check_usage(ctx: click.Context) -> None:
    """Refuse options that would be ignored."""
    named = ctx.params
    if named["show"]:
        _check_show(ctx)
        return
    for option in ("report", "plot"):
        if "://" in (named[option] or ""):
            raise click.UsageError(f"--{option} writes to this machine: give a path, not a URL.")
    if named["each"]:
        scored = ctx.get_parameter_source("output") is click.core.ParameterSource.DEFAULT
        _check_each(named, unnamed=bool(named["sweep"]) and scored)
    elif len(named["last"] or ()) > 1:
        raise click.UsageError("--last takes several numbers only with --each.")
    if _searches(named):
        _check_search(named)
    if named["minus"]:
        _check_minus(named, _given(ctx, _OF_CHECKPOINTS))
    _check_task(named)
    _check_best(ctx)
    _check_plot(named)
    _check_batchnorm(ctx)
    _check_checkpoints(ctx)


def _given(ctx: click.Context, names: Iterable[str]) -> Iterator[str]:
    """Yield the options that the user gave among some parameters."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is click.core.ParameterSource.COMMANDLINE:
            yield max(parameter.opts, key=len)


def _searches(named: Mapping[str, Any]) -> bool:
    return bool(named["sweep"] or named["greedy"])


def _check_show(ctx: click.Context) -> None:
    """Refuse options that cannot be combined with --show."""
    others = {one.name or "" for one in ctx.command.params} - {"show", "as_json", "verbose"}
    for other in _given(ctx, others):
        what = f"--show cannot be combined with {other.lower()}"
        raise click.UsageError(f"{what}. {_LEAVE_OUT}")


def _check_task(named: Mapping[str, Any]) -> None:
    """Refuse a command line without anything to do, and options that contradict each other."""
    if not (named["checkpoints"] or named["start_from"] or named["recompute_bn"]):
        raise click.UsageError("Give the checkpoints to average, as in: swa-avg ckpts/epoch_*.pt")
    if named["key"] and named["ema"] is not None:
        raise click.UsageError("Give --key or --ema/--no-ema, not both.")
    if named["recompute_bn"] and not named["data"]:
        raise click.UsageError("--recompute-bn needs --data MOD:ATTR.")
    if named["keep_wrapper"] and named["dtype"] != "keep":
        raise click.UsageError(
            "--keep-wrapper cannot be combined with --dtype: it keeps the dtypes of the file. "
            f"{_LEAVE_OUT}"
        )


def _check_best(ctx: click.Context) -> None:
    """Refuse --best without its metric, and a metric that nothing uses."""
    named = ctx.params
    if named["best"] is not None and not named["metric"]:
        raise click.UsageError("--best needs --metric NAME, as in --metric val_loss.")
    if named["best"] is None and not _searches(named):
        for option in _given(ctx, ("metric", "mode")):
            raise click.UsageError(f"{option} needs --best N, or --sweep or --greedy.")


def _check_plot(named: Mapping[str, Any]) -> None:
    """Refuse --plot if there is nothing to draw."""
    if _searches(named) or not named["plot"]:
        return
    if named["each"]:
        raise click.UsageError("--plot with --each needs --sweep MOD:ATTR.")
    if not named["distances"]:
        raise click.UsageError("--plot needs --sweep, --greedy or --distances.")


def _check_batchnorm(ctx: click.Context) -> None:
    """Refuse options of --recompute-bn without it; a search uses --model, too."""
    named = ctx.params
    if named["recompute_bn"]:
        return
    used = ("model",) if _searches(named) else ()
    for option in _given(ctx, [one for one in BATCHNORM if one not in used]):
        needed = "" if named["data"] else " --data MOD:ATTR"
        raise click.UsageError(f"{option} needs --recompute-bn{needed}.")


def _check_checkpoints(ctx: click.Context) -> None:
    """Refuse options that need checkpoints, or something to average, if there are none."""
    named = ctx.params
    unfit = () if named["checkpoints"] else _OF_CHECKPOINTS
    if not (named["checkpoints"] or named["start_from"]):
        unfit = (*unfit, *_OF_AVERAGING)
    for option in _given(ctx, unfit):
        raise click.UsageError(f"{option} needs checkpoints to average.")


def _check_minus(named: Mapping[str, Any], unfit: Iterable[str]) -> None:
    """Refuse options that cannot be combined with --minus: `unfit`, and checkpoints."""
    if len(named["start_from"]) != 1:
        raise click.UsageError("--minus needs one --start-from: the average to subtract from.")
    if named["checkpoints"]:
        raise click.UsageError("--minus takes no checkpoints, only --start-from. Leave them out.")
    for option in unfit:
        raise click.UsageError(f"--minus cannot be combined with {option}. {_LEAVE_OUT}")


def _check_each(named: Mapping[str, Any], *, unnamed: bool) -> None:
    """Refuse options that cannot be combined with --each.

    Args:
        named: The options.
        unnamed: Whether the averages are only scored, and written under no name.
    """
    from swa_avg.planning import check_pattern

    _check_apart("--each", named, ("start_from", "minus", "best", "distances", "greedy"))
    if not named["last"]:
        raise click.UsageError("--each needs --last N: the number of checkpoints to average.")
    if min(named["last"]) < 1:
        raise click.UsageError("--last must be at least 1.")
    if unnamed:
        for other in ("force", "keep_wrapper", "max_shard_size"):
            if named[other]:
                option = f"--{other.replace('_', '-')}"
                raise click.UsageError(f"{option} needs -o, as in -o 'merged/{{step}}.pt'.")
    else:
        try:
            check_pattern(named["output"], named["last"])
        except ValueError as error:
            raise click.UsageError(f"--each: {error}.") from error
    if ranks.are_several():
        raise click.UsageError("--each runs in one process: start it without torchrun.")


def _check_search(named: Mapping[str, Any]) -> None:
    """Refuse options that cannot be combined with a search."""
    option = "--sweep" if named["sweep"] else "--greedy"
    if named["sweep"] and named["greedy"]:
        raise click.UsageError("Give --sweep or --greedy, not both.")
    _check_apart(option, named, ("start_from", "minus", "distances"))
    if not named["checkpoints"]:
        raise click.UsageError(f"{option} needs checkpoints to average.")
    if named["bn_buffers"] == "first" and not named["each"]:
        raise click.UsageError(
            f"{option} cannot be combined with --bn-buffers first: "
            f"the averages start at different checkpoints. {_LEAVE_OUT}"
        )
    if ranks.are_several():
        raise click.UsageError(f"{option} runs in one process: start it without torchrun.")


def _check_apart(option: str, named: Mapping[str, Any], others: Iterable[str]) -> None:
    """Refuse options that cannot be combined with another one."""
    for other in others:
        if named[other]:
            name = other.replace("_", "-")
            raise click.UsageError(f"{option} cannot be combined with --{name}. {_LEAVE_OUT}")
