"""The options of the command line: declaration, groups, checks, parsing. Does not print."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import swa_avg

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from swa_avg.planning import Options

_GROUPS = {
    "Choose": ("--last", "--epochs", "--best", "--metric", "--mode", "--exclude"),
    "Read": ("--key", "--ema"),
    "Average": ("--bn-buffers", "--dtype", "--start-from", "--minus", "--each"),
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


# The BatchNorm options; their names are the fields of `swa_avg.batchnorm.Recompute`.
BATCHNORM = ("data", "model", "forward", "device", "estimator", "batches", "amp")
# Parameters of these kinds are names of files, which the shell completes.
_FILES = ("AVERAGE", "FILE", "MOD:ATTR", "PATH")


class _FileName(click.types.StringParamType):
    """A text for which the shell completes the names of files."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class GroupedCommand(click.Command):
    """A command whose `--help` shows its options in groups, and which completes file names."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        for parameter in self.params:
            named = parameter.metavar in _FILES and parameter.name != "key"
            if named or isinstance(parameter, click.Argument):
                parameter.type = _FileName()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group of options."""
        records = {
            name: parameter.get_help_record(ctx)
            for parameter in self.get_params(ctx)
            for name in parameter.opts
        }
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name])])


def size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Parse a number of bytes, such as 5GB, 500MB or 1000000, in powers of 1000."""
    if value is None:
        return None
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    digits = value.upper().rstrip("KMGTB")
    unit = units.get(value.upper()[len(digits) :])
    if unit is None or not digits.strip().isdecimal() or int(digits) == 0:
        raise click.BadParameter(f"{value!r} is not a size such as 5GB or 500MB.")
    return int(digits) * unit


def lasts(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Parse one or more numbers, separated by commas."""
    if value is None:
        return None
    try:
        return tuple(map(int, value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a valid integer.") from None


# All arguments and options. `_GROUPS` sets the order of `--help`.
_DECLARED = (
    click.argument("checkpoints", nargs=-1),
    click.option(
        "--last", callback=lasts, metavar="N", help="Take only the N latest (with --each: N,N,…)."
    ),
    click.option(
        "--epochs",
        metavar="A:B[:STEP]",
        help="Take every STEP-th epoch (or step) from A to B, both included.",
    ),
    click.option("--best", type=int, metavar="N", help="Take only the N best by --metric."),
    click.option(
        "--metric",
        metavar="NAME",
        help="Metric for --best, or name of the score for a search.",
    ),
    click.option(
        "--mode",
        type=click.Choice(["min", "max"]),
        help="min if lower values are better, max if higher ones are.",
    ),
    click.option(
        "--exclude",
        metavar="GLOB",
        multiple=True,
        help="Leave out paths or names that match. Can be repeated.",
    ),
    click.option(
        "--key",
        metavar="PATH",
        multiple=True,
        help="Path of the state_dict in each file (a.b.c), if it is not found.",
    ),
    click.option(
        "--ema/--no-ema",
        default=None,
        help="Average the EMA or SWA weights that the run saved, or the raw weights.",
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
        help="Output dtype: keep, float32, bfloat16 or float16.  [default: keep]",
    ),
    click.option(
        "--start-from",
        metavar="AVERAGE",
        multiple=True,
        help="Add the checkpoints to this earlier average. Can be repeated.",
    ),
    click.option(
        "--minus",
        metavar="AVERAGE",
        help="Subtract this average from --start-from; gives the mean of the rest.",
    ),
    click.option(
        "--each",
        is_flag=True,
        help="Average the --last N at every checkpoint, as in -o 'merged/{step}.pt'.",
    ),
    click.option(
        "-o",
        "--output",
        metavar="PATH",
        default="swa.pt",
        help="Output: .pt, .safetensors or a folder.  [default: swa.pt]",
    ),
    click.option("-f", "--force", is_flag=True, help="Replace the output if it exists."),
    click.option(
        "--keep-wrapper",
        is_flag=True,
        help="Write a copy of the last checkpoint with the averaged weights.",
    ),
    click.option(
        "--max-shard-size",
        callback=size,
        metavar="SIZE",
        help="Largest file of an output folder.  [default: 5GB]",
    ),
    click.option(
        "--recompute-bn", is_flag=True, help="Recompute BatchNorm statistics over --data."
    ),
    click.option(
        "--data", metavar="MOD:ATTR", help="Batches: a loader, or a function that returns one."
    ),
    click.option(
        "--model", metavar="MOD:ATTR", help="The model.  [default: model in the MOD of --data]"
    ),
    click.option(
        "--forward", metavar="MOD:ATTR", help="Function forward(model, batch) that runs the model."
    ),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda[:i] or mps.  [default: auto]"),
    click.option(
        "--bn-estimator",
        "estimator",
        type=click.Choice(["population", "torch"]),
        metavar="NAME",
        help="population, or torch (like update_bn).  [default: population]",
    ),
    click.option(
        "--bn-batches",
        "batches",
        type=click.IntRange(1),
        metavar="N",
        help="Use only the first N batches.",
    ),
    click.option(
        "--amp",
        type=click.Choice(["off", "bf16", "fp16"]),
        help="Autocast the forward pass.  [default: off]",
    ),
    click.option(
        "--sweep",
        metavar="MOD:ATTR",
        help="Average the last 1, 2, 3, …; write the best. With --each: score all.",
    ),
    click.option(
        "--greedy",
        metavar="MOD:ATTR",
        help="Greedy soup: add a checkpoint only if it improves evaluate(model).",
    ),
    click.option(
        "--plot", metavar="FILE", help="Plot the scores or distances: .png, .svg or .html."
    ),
    click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("--report", metavar="FILE", help="Write the report as JSON to a file."),
    click.option(
        "--distances", is_flag=True, help="Show how far each checkpoint is from the mean."
    ),
    click.option("--verify", is_flag=True, help="Reread the output; recompute a sample of it."),
    click.option("--show", metavar="FILE", help="Print how an average was made, and exit."),
    click.option("-q", "--quiet", is_flag=True, help="Print only errors."),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Show every tensor, and every disagreement between checkpoints.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1),
        metavar="N",
        help="Number of cores to use.  [default: up to 16]",
    ),
    click.version_option(swa_avg.__version__, prog_name="swa-avg", message="%(prog)s %(version)s"),
)


def declared(command: Callable[..., None]) -> Callable[..., None]:
    """Add all arguments and options to a command."""
    for add in reversed(_DECLARED):
        command = add(command)
    return command


@dataclass(frozen=True)
class Run:
    """The parsed command line.

    Attributes:
        checkpoints: Files, folders or patterns of them.
        output: The path of the output.
        options: The options of the average.
        recompute: The fields of `Recompute`; None without --recompute-bn.
        search: The options of the search; None without --sweep and --greedy.
        each: The lengths of the windows along the run; empty without --each.
        dry_run: Whether to show the plan only.
        as_json: Whether to print the report as JSON.
        report: The path of the JSON report, or None.
        plot: The path of the picture of the scores or the distances, or None.
        quiet: Whether to print only errors.
        verbose: Whether to show every tensor and every disagreement.
        threads: The number of worker processes or threads; None for one per core.
    """

    checkpoints: tuple[str, ...]
    output: Path
    options: Options
    recompute: dict[str, Any] | None
    search: Search | None
    each: tuple[int, ...]
    dry_run: bool
    as_json: bool
    report: Path | None
    plot: Path | None
    quiet: bool
    verbose: bool
    threads: int | None


@dataclass(frozen=True)
class Search:
    """The options of a search for the best average.

    Attributes:
        evaluate: `MOD:ATTR` of the function that scores a model.
        greedy: Whether to make a greedy soup instead of a sweep over the last 1, 2, 3, ….
        model: `MOD:ATTR` of the model, or None.
        metric: The name of the score, or None.
        mode: Whether low (min) or high (max) scores are better, or None.
    """

    evaluate: str
    greedy: bool
    model: str | None
    metric: str | None
    mode: str | None

    @property
    def option(self) -> str:
        """The name of the option that starts this search."""
        return "--greedy" if self.greedy else "--sweep"

    @property
    def score_options(self) -> dict[str, str | None]:
        """The options that describe the score and the model."""
        return {"model": self.model, "metric": self.metric, "mode": self.mode}


def run_of(given: dict[str, Any]) -> Run:
    """Build a `Run` from the options of the command line."""
    from swa_avg.planning import Choice, Options
    from swa_avg.storage import GivenPath, path_of

    def taken(kind: type) -> dict[str, Any]:
        """Remove and return the options that are fields of a dataclass; None means default."""
        names = [one.name for one in fields(kind) if one.name in given]
        return {name: value for name in names if (value := given.pop(name)) is not None}

    # Resolve the paths now: the user's code may change the current folder.
    given["output"] = path_of(given["output"])
    for name in ("report", "plot"):
        given[name] = GivenPath.of(given[name]) if given[name] else None
    search = _search_of(given)
    numbers = given["last"]
    given["each"] = numbers if given["each"] else ()
    given["last"] = numbers[0] if numbers and not given["each"] else None
    try:
        choice = Choice(**taken(Choice))
    except ValueError as error:
        raise click.UsageError(f"{_with_options(str(error))}.") from error
    batchnorm = {name: value for name in BATCHNORM if (value := given.pop(name)) is not None}
    options = Options(choice=choice, **taken(Options))
    recompute = batchnorm if given["recompute_bn"] else None
    own = {one.name: given.get(one.name) for one in fields(Run)}
    return Run(**own | {"options": options, "recompute": recompute, "search": search})


def _with_options(text: str) -> str:
    """Return the text on an invalid value with the options in place of the parameters."""
    text = re.sub(r"^(last|epochs|best)\b", r"--\1", text)
    return text.replace("the mode, min or max", "--mode min or --mode max")


def _search_of(given: dict[str, Any]) -> Search | None:
    """Build a `Search`, or return None; `--metric` and `--mode` also belong to `--best`."""
    evaluate = given["sweep"] or given["greedy"]
    if not evaluate:
        return None
    found = {name: given[name] for name in ("model", "metric", "mode")}
    if given["best"] is None:
        given["metric"] = given["mode"] = None
    return Search(evaluate, greedy=bool(given["greedy"]), **found)
