"""How the options of the command line are grouped and read. Prints nothing."""

from __future__ import annotations

import click

_GROUPS = {
    "Choose": ("--last", "--epochs", "--best", "--metric", "--mode", "--exclude"),
    "Read": ("--key", "--ema"),
    "Average": ("--bn-buffers", "--dtype"),
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
    "Report": ("--dry-run", "--json", "--quiet", "--verbose", "--version", "--help"),
    "Speed": ("--threads",),
}


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
