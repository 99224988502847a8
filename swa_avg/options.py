"""How the options of the command line are grouped and read. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import click

_GROUPS = {
    "Choose": ("--last", "--epochs", "--best", "--metric", "--mode", "--exclude"),
    "Read": ("--key", "--ema"),
    "Average": ("--bn-buffers", "--dtype", "--start-from"),
    "Write": ("--output", "--force", "--keep-wrapper", "--max-shard-size"),
    "BatchNorm": (
        "--recompute-bn",
        "--data",
        "--model",
        "--forward",
        "--device",
        "--bn-estimator",
        "--bn-batches",
        "--amp",
    ),
    "Report": (
        "--dry-run",
        "--json",
        "--report",
        "--distances",
        "--verify",
        "--show",
        "--quiet",
        "--verbose",
        "--version",
        "--help",
    ),
    "Speed": ("--threads",),
}


# What recomputes BatchNorm: the parameters' names are those of `recompute.Recompute`.
BATCHNORM = ("data", "model", "forward", "device", "estimator", "batches", "amp")
_CHOICE = ("last", "epochs", "best", "metric", "mode", "exclude")
_OF_CHECKPOINTS = (*_CHOICE, "bn_buffers", "keep_wrapper", "distances", "verify")
_OF_AVERAGING = ("ema", "dtype", "max_shard_size", "threads", "dry_run", "force")


class GroupedCommand(click.Command):
    """A command whose `--help` shows its options by what they are about."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group."""
        records = {
            name: parameter.get_help_record(ctx)
            for parameter in self.get_params(ctx)
            for name in parameter.opts
        }
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name])])


def check_usage(ctx: click.Context) -> None:
    """Refuse options that would be ignored."""

    def given(names: Iterable[str]) -> Iterator[str]:
        for parameter in ctx.command.params:
            source = ctx.get_parameter_source(parameter.name or "")
            if parameter.name in names and source is click.core.ParameterSource.COMMANDLINE:
                yield max(parameter.opts, key=len)

    named = ctx.params
    if named["show"]:
        others = {one.name or "" for one in ctx.command.params} - {"show", "as_json", "verbose"}
        for other in given(others):
            raise click.UsageError(f"--show stands alone: leave out {other.lower()}.")
        return
    averages = named["checkpoints"] or named["start_from"]
    if not averages and not named["recompute_bn"]:
        raise click.UsageError("Give the checkpoints to average, as in: swa-avg ckpts/epoch_*.pt")
    if named["key"] and named["ema"]:
        raise click.UsageError("Give --key or --ema, not both.")
    if named["recompute_bn"] and not named["data"]:
        raise click.UsageError("--recompute-bn needs --data MOD:ATTR.")
    if named["keep_wrapper"] and named["dtype"] != "keep":
        raise click.UsageError("--keep-wrapper keeps the dtypes too: it goes without --dtype.")
    if not named["recompute_bn"]:
        for option in given(BATCHNORM):
            raise click.UsageError(f"{option} needs --recompute-bn.")
    unfit = () if named["checkpoints"] else _OF_CHECKPOINTS
    for option in given(unfit if averages else (*unfit, *_OF_AVERAGING)):
        raise click.UsageError(f"{option} needs checkpoints to average.")


def size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read a number of bytes, such as 5GB, 500MB or 1000000, in powers of 1000."""
    if value is None:
        return None
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    digits = value.upper().rstrip("KMGTB")
    unit = units.get(value.upper()[len(digits) :])
    if unit is None or not digits.strip().isdecimal() or int(digits) == 0:
        raise click.BadParameter(f"{value!r} is no size, such as 5GB or 500MB")
    return int(digits) * unit
