"""How the options of the command line are grouped and read. Prints nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import swa_avg

if TYPE_CHECKING:
    from swa_avg.planning import Options

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
    "Search": ("--sweep", "--greedy", "--plot"),
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
_OF_AVERAGING = ("dtype", "max_shard_size", "threads", "dry_run", "force")


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
    if named["key"] and named["ema"] is not None:
        raise click.UsageError("Give --key or --ema/--no-ema, not both.")
    if named["recompute_bn"] and not named["data"]:
        raise click.UsageError("--recompute-bn needs --data MOD:ATTR.")
    if named["keep_wrapper"] and named["dtype"] != "keep":
        raise click.UsageError("--keep-wrapper keeps the dtypes too: it goes without --dtype.")
    searches = named["sweep"] or named["greedy"]
    if searches:
        _check_search(named)
    elif named["plot"]:
        raise click.UsageError("--plot needs --sweep or --greedy.")
    if not named["recompute_bn"]:
        for option in given([one for one in BATCHNORM if not (searches and one == "model")]):
            raise click.UsageError(f"{option} needs --recompute-bn.")
    unfit = () if named["checkpoints"] else _OF_CHECKPOINTS
    for option in given(unfit if averages else (*unfit, *_OF_AVERAGING)):
        raise click.UsageError(f"{option} needs checkpoints to average.")


def _check_search(named: Mapping[str, Any]) -> None:
    """Refuse what does not go with a search."""
    option = "--sweep" if named["sweep"] else "--greedy"
    if named["sweep"] and named["greedy"]:
        raise click.UsageError("Give --sweep or --greedy, not both.")
    if not named["checkpoints"]:
        raise click.UsageError(f"{option} needs checkpoints to average.")
    for other in ("start_from", "distances"):
        if named[other]:
            raise click.UsageError(f"{option} goes without --{other.replace('_', '-')}.")
    if named["bn_buffers"] == "first":
        raise click.UsageError(f"{option} goes without --bn-buffers first: who is first varies.")
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1:
        raise click.UsageError(f"{option} is done by one process: start it without torchrun.")


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


# What the command takes, in no order that shows: `--help` has its own.
_DECLARED = (
    click.argument("checkpoints", nargs=-1),
    click.option("--last", type=int, metavar="N", help="Take only the N latest."),
    click.option(
        "--epochs", metavar="A:B[:STEP]", help="Take epochs (or steps) A to B, B included."
    ),
    click.option("--best", type=int, metavar="N", help="Take only the N best by --metric."),
    click.option(
        "--metric", metavar="NAME", help="As the checkpoints or files beside them record it."
    ),
    click.option(
        "--mode", type=click.Choice(["min", "max"]), help="What is good, if NAME hides it."
    ),
    click.option(
        "--exclude", metavar="GLOB", multiple=True, help="Leave out these paths or names."
    ),
    click.option("--key", metavar="PATH", multiple=True, help="Where the state_dict is (a.b.c)."),
    click.option(
        "--ema/--no-ema",
        default=None,
        help="Take the EMA or SWA weights that the run kept, or the raw ones.",
    ),
    click.option(
        "--bn-buffers",
        type=click.Choice(["last", "first", "mean", "reset"]),
        default="last",
        metavar="WHICH",
        help="BatchNorm statistics: last, first, mean or reset.  [default: last]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
        default="keep",
        metavar="NAME",
        help="Write as keep, float32, bfloat16 or float16.  [default: keep]",
    ),
    click.option("--start-from", metavar="AVERAGE", multiple=True, help="Go on from this average."),
    click.option(
        "-o",
        "--output",
        metavar="PATH",
        default="swa.pt",
        help="The file to write; *.safetensors is one.  [default: swa.pt]",
    ),
    click.option("-f", "--force", is_flag=True, help="Replace the output if it exists."),
    click.option(
        "--keep-wrapper", is_flag=True, help="Keep the last file; replace only its weights."
    ),
    click.option(
        "--max-shard-size", callback=size, metavar="SIZE", help="Of a folder.  [default: 5GB]"
    ),
    click.option(
        "--recompute-bn", is_flag=True, help="Recompute BatchNorm statistics over --data."
    ),
    click.option("--data", metavar="MOD:ATTR", help="Batches: a loader, or what gives one."),
    click.option(
        "--model", metavar="MOD:ATTR", help="The network.  [default: model of --data's MOD]"
    ),
    click.option(
        "--forward", metavar="MOD:ATTR", help="forward(model, batch), if batch[0] is not it."
    ),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda[:i] or mps.  [default: auto]"),
    click.option(
        "--bn-estimator",
        "estimator",
        type=click.Choice(["population", "torch"]),
        metavar="NAME",
        help="population, or torch: as update_bn.  [default: population]",
    ),
    click.option(
        "--bn-batches",
        "batches",
        type=click.IntRange(1),
        metavar="N",
        help="Use only so many batches.",
    ),
    click.option(
        "--amp",
        type=click.Choice(["off", "bf16", "fp16"]),
        help="Autocast the forward.  [default: off]",
    ),
    click.option("--sweep", metavar="MOD:ATTR", help="Average the last 1, 2, 3, …; keep the best."),
    click.option(
        "--greedy", metavar="MOD:ATTR", help="Average only what makes evaluate(model) better."
    ),
    click.option("--plot", metavar="FILE", help="Draw the scores: .png, .svg or .html."),
    click.option("--dry-run", is_flag=True, help="Show what would be done; read headers only."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("--report", metavar="FILE", help="Write the report, as JSON, to a file."),
    click.option(
        "--distances", is_flag=True, help="Tell how far each checkpoint is from the mean."
    ),
    click.option("--verify", is_flag=True, help="Read the output again; average a sample anew."),
    click.option("--show", metavar="FILE", help="Print how an average was made, and stop."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Show every tensor and every disagreement."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        metavar="N",
        help="How many cores.  [default: up to 16]",
    ),
    click.version_option(swa_avg.__version__, prog_name="swa-avg", message="%(prog)s %(version)s"),
)


def declared(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all arguments and options that there are."""
    for add in reversed(_DECLARED):
        command = add(command)
    return command


@dataclass(frozen=True)
class Run:
    """What one call of the command is to do.

    Attributes:
        checkpoints: Files, folders or patterns of them.
        output: What to write.
        options: How to average.
        recompute: The fields of `recompute.Recompute`; None where BatchNorm is left alone.
        search: How to find the best average; None where there is nothing to find.
        dry_run: Whether only to show what would be done.
        as_json: Whether to print the report as JSON.
        report: Where to write the report, if anywhere.
        quiet: Whether to print nothing but errors.
        verbose: Whether to show every tensor and every disagreement.
        threads: How many processes or threads work; None for one a core.
    """

    checkpoints: tuple[str, ...]
    output: Path
    options: Options
    recompute: dict[str, Any] | None
    search: Search | None
    dry_run: bool
    as_json: bool
    report: Path | None
    quiet: bool
    verbose: bool
    threads: int | None


@dataclass(frozen=True)
class Search:
    """How to find the best average.

    Attributes:
        evaluate: `MOD:ATTR` of what judges.
        greedy: Whether to make a greedy soup; else to sweep over the last 1, 2, 3, ….
        model: `MOD:ATTR` of the model, if it was given.
        metric: What the score is called, if that was given.
        mode: Which way is better, if that was given.
        plot: Where to draw the scores, if anywhere.
    """

    evaluate: str
    greedy: bool
    model: str | None
    metric: str | None
    mode: str | None
    plot: Path | None

    @property
    def option(self) -> str:
        """The option that asked for it."""
        return "--greedy" if self.greedy else "--sweep"

    @property
    def told(self) -> dict[str, str | None]:
        """What the user said of the score and the model."""
        return {"model": self.model, "metric": self.metric, "mode": self.mode}


def run_of(given: dict[str, Any]) -> Run:
    """Sort the options of the command line by what they are for."""
    from swa_avg.planning import Choice, Options
    from swa_avg.storage import GivenPath, path_of

    def taken(kind: type) -> dict[str, Any]:
        """Take what a dataclass has fields for; None stands for its default."""
        names = [one.name for one in fields(kind) if one.name in given]
        return {name: value for name in names if (value := given.pop(name)) is not None}

    # The user's code may change the current folder: paths keep the meaning they have now.
    given["output"] = path_of(given["output"])
    for name in ("report", "plot"):
        given[name] = GivenPath.of(given[name]) if given[name] else None
    search = _search_of(given)
    try:
        choice = Choice(**taken(Choice))
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    batchnorm = {name: value for name in BATCHNORM if (value := given.pop(name)) is not None}
    options = Options(choice=choice, **taken(Options))
    recompute = batchnorm if given["recompute_bn"] else None
    own = {one.name: given.get(one.name) for one in fields(Run)}
    return Run(**own | {"options": options, "recompute": recompute, "search": search})


def _search_of(given: dict[str, Any]) -> Search | None:
    """Take what a search needs; it shares the metric with the choice of the best."""
    evaluate = given["sweep"] or given["greedy"]
    if not evaluate:
        return None
    found = {name: given[name] for name in ("model", "metric", "mode", "plot")}
    if given["best"] is None:
        given["metric"] = given["mode"] = None
    return Search(evaluate, greedy=bool(given["greedy"]), **found)
