"""The command line: parse, call, print, exit codes. The only module that prints.

Imports nothing heavy before it must, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import swa_avg
from swa_avg import messages
from swa_avg.errors import MismatchError, SelectionError, SwaAvgError, printable
from swa_avg.options import GroupedCommand, size

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Report
    from swa_avg.recompute import Recompute
    from swa_avg.select import Choice


@click.command(
    cls=GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("checkpoints", nargs=-1)
@click.option("--last", type=int, metavar="N", help="Take only the N latest.")
@click.option("--epochs", metavar="A:B[:STEP]", help="Take epochs (or steps) A to B, B included.")
@click.option("--best", type=int, metavar="N", help="Take only the N best by --metric.")
@click.option("--metric", metavar="NAME", help="As the checkpoints or files beside them record it.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="What is good, if NAME hides it.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out these paths or names.")
@click.option("--key", metavar="PATH", multiple=True, help="Where the state_dict is (a.b.c).")
@click.option("--ema", is_flag=True, help="Take the EMA or SWA weights that the run kept.")
@click.option(
    "--bn-buffers",
    type=click.Choice(["last", "first", "mean", "reset"]),
    default="last",
    metavar="WHICH",
    help="BatchNorm statistics: last, first, mean or reset.  [default: last]",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    metavar="NAME",
    help="Write as keep, float32, bfloat16 or float16.  [default: keep]",
)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    default="swa.pt",
    help="The file to write; *.safetensors is one.  [default: swa.pt]",
)
@click.option("-f", "--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--keep-wrapper", is_flag=True, help="Keep the last file; replace only its weights.")
@click.option(
    "--max-shard-size", callback=size, metavar="SIZE", help="Of a folder.  [default: 5GB]"
)
@click.option("--recompute-bn", is_flag=True, help="Recompute BatchNorm statistics over --data.")
@click.option("--data", metavar="MOD:ATTR", help="Batches: a loader, or what gives one.")
@click.option("--model", metavar="MOD:ATTR", help="The network.  [default: model of --data's MOD]")
@click.option("--forward", metavar="MOD:ATTR", help="forward(model, batch), if batch[0] is not it.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda[:i] or mps.  [default: auto]")
@click.option(
    "--bn-estimator",
    type=click.Choice(["population", "torch"]),
    metavar="NAME",
    help="population, or torch: as update_bn.  [default: population]",
)
@click.option("--bn-batches", type=click.IntRange(1), metavar="N", help="Use only so many batches.")
@click.option(
    "--amp",
    type=click.Choice(["off", "bf16", "fp16"]),
    help="Autocast the forward.  [default: off]",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; read headers only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show every tensor and every disagreement.")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="How many threads.  [default: cores]"
)
@click.version_option(swa_avg.__version__, prog_name="swa-avg", message="%(prog)s %(version)s")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Average the checkpoints of a finished training run into one.

    Every weight becomes its exact mean over the CHECKPOINTS (.pt, .pth, .ckpt, .bin,
    .safetensors), rounded once. Nothing in them is executed; they are never changed.
    With --recompute-bn the average gets the BatchNorm statistics that belong to it; without
    CHECKPOINTS it gives them to the output that is there already.

    \b
    Examples:
      swa-avg ckpts/epoch_*.pt -o swa.pt
      swa-avg --recompute-bn --data mod:loader
      swa-avg ckpts/*.ckpt -o swa.safetensors --recompute-bn --data mod:loader
      swa-avg ckpts/ --best 5 --metric val_loss
      swa-avg ckpts/*.ckpt --dry-run -v
    """  # noqa: D301 - \b is click's mark: do not wrap the next paragraph
    _check_usage(ctx)
    for name, default in _BN_DEFAULTS.items():
        options[name] = default if options[name] is None else options[name]
    run = _Run(choice=_choice(options), **options)
    if run.recompute_bn and not run.dry_run:
        _recompute(run)
    elif _leads():  # of several ranks one averages: it is as fast as the disk
        _average(run)


_BN_DEFAULTS = {"device": "auto", "bn_estimator": "population", "amp": "off"}
_BN_OPTIONS = ("data", "model", "forward", "device", "bn_estimator", "bn_batches", "amp")
_CHOICE = ("last", "epochs", "best", "metric", "mode", "exclude")
_AVERAGE_OPTIONS = (
    *_CHOICE,
    *("ema", "bn_buffers", "dtype", "keep_wrapper", "max_shard_size", "threads", "dry_run"),
    "force",
)


def _check_usage(ctx: click.Context) -> None:
    """Refuse options that would be ignored."""

    def given(names: tuple[str, ...]) -> list[str]:
        source = click.core.ParameterSource.COMMANDLINE
        return [
            f"--{name.replace('_', '-')}"
            for name in names
            if ctx.get_parameter_source(name) is source
        ]

    checkpoints, recompute = ctx.params["checkpoints"], ctx.params["recompute_bn"]
    if not checkpoints and not recompute:
        raise click.UsageError("Give the checkpoints to average, as in: swa-avg ckpts/epoch_*.pt")
    if ctx.params["key"] and ctx.params["ema"]:
        raise click.UsageError("Give --key or --ema, not both.")
    if recompute and not ctx.params["data"]:
        raise click.UsageError("--recompute-bn needs --data MOD:ATTR.")
    if not recompute and given(_BN_OPTIONS):
        raise click.UsageError(f"{given(_BN_OPTIONS)[0]} needs --recompute-bn.")
    if ctx.params["keep_wrapper"] and ctx.params["dtype"] != "keep":
        raise click.UsageError("--keep-wrapper keeps the dtypes too: it goes without --dtype.")
    if not checkpoints and given(_AVERAGE_OPTIONS):
        raise click.UsageError(f"{given(_AVERAGE_OPTIONS)[0]} needs checkpoints to average.")


def _choice(options: dict[str, Any]) -> Choice:
    """Take the options of one choice out of `options`, and check that they are one."""
    from swa_avg.select import Choice

    try:
        return Choice(**{name: options.pop(name) for name in _CHOICE})
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error


@dataclass(frozen=True)
class _Run:
    """The options of one run."""

    checkpoints: tuple[str, ...]
    choice: Choice
    output: str
    key: tuple[str, ...]
    ema: bool
    bn_buffers: str
    dtype: str
    force: bool
    keep_wrapper: bool
    max_shard_size: int | None
    recompute_bn: bool
    data: str
    model: str | None
    forward: str | None
    device: str
    bn_estimator: Any
    bn_batches: int | None
    amp: Any
    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool
    threads: int | None

    def planned(self) -> AbstractContextManager[Averaging]:
        """Open the checkpoints and plan their average."""
        from swa_avg.averaging import planned

        return planned(
            self.checkpoints,
            self.output,
            bn_buffers=self.bn_buffers,
            dtype=self.dtype,
            force=self.force or self.dry_run,
            key=self.key,
            ema=self.ema,
            keep_wrapper=self.keep_wrapper,
            max_shard_size=self.max_shard_size,
            choice=self.choice,
        )

    def recompute_options(self) -> Recompute:
        """Return how BatchNorm is recomputed."""
        from swa_avg.recompute import Recompute

        return Recompute(
            data=self.data,
            model=self.model,
            forward=self.forward,
            device=self.device,
            estimator=self.bn_estimator,
            amp=self.amp,
            batches=self.bn_batches,
        )


def _average(run: _Run) -> None:
    """Average checkpoints, and nothing else."""
    with run.planned() as averaging:
        if run.dry_run:
            _show_plan(averaging, run)
            return
        with _written(averaging, run) as (file, report):
            file.commit()
    if run.as_json:
        _print_json(report.to_dict() | _tensors(averaging, run))
    elif not run.quiet:
        _show_average(report, averaging, run)
        if report.stale:
            _note(["BatchNorm statistics do not fit the average; --recompute-bn makes them fit"])
        _say([messages.of_output(report.output, report.bytes_written)])


@contextmanager
def _written(averaging: Averaging, run: _Run) -> Iterator[tuple[Any, Report]]:
    """Average into a file or folder; it becomes the output when it is committed."""
    with averaging.open_output() as file:
        with _bar(averaging.plan.bytes_to_read, run, unit="B", desc="averaging") as bar:
            report = averaging.write(file, threads=run.threads, progress=bar and bar.update)
        yield file, report


def _recompute(run: _Run) -> None:
    """Recompute BatchNorm: of the average of checkpoints, or of the output that is there."""
    from swa_avg.recompute import copy_of, session

    with ExitStack() as entered:
        # Planned first: what the headers tell needs none of the user's code.
        averaging = entered.enter_context(run.planned()) if run.checkpoints and _leads() else None
        if averaging and averaging.is_folder:
            raise click.UsageError("--recompute-bn writes a file, not a folder: name one with -o.")
        bn = entered.enter_context(session(run.recompute_options()))
        if not bn.leads:
            bn.follow()
            return
        report = None
        if averaging:
            file, report = entered.enter_context(_written(averaging, run))
        else:
            file = entered.enter_context(copy_of(Path(run.output), run.key))
        with _bar(bn.batches, run, unit="batch", desc="recomputing BatchNorm") as bar:
            wrapped = averaging is None or run.keep_wrapper
            batchnorm, notes = bn.recompute(
                file,
                run.key if wrapped else (),
                ema=run.ema and wrapped,
                progress=bar and partial(_advance, bar),
            )
        file.commit()
    if run.as_json:
        averaged = report.to_dict() if report else {"output": run.output}
        made = {"stale": bool(batchnorm.unreached), "batchnorm": batchnorm.to_json()}
        tensors = _tensors(averaging, run) if averaging else {}
        _print_json(averaged | made | {"batchnorm_notes": list(notes)} | tensors)
    elif not run.quiet:
        if report and averaging:
            _show_average(report, averaging, run)
        _say(messages.of_recompute(batchnorm, layers=run.verbose))
        _note(notes)
        _say([messages.of_output(run.output, Path(run.output).stat().st_size)])


def _tensors(averaging: Averaging, run: _Run) -> dict[str, object]:
    return {"tensors": averaging.to_dict()["tensors"]} if run.verbose else {}


def _leads() -> bool:
    """Tell whether this process is the only one, or the first of those torchrun started."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (world.isdecimal() and int(world) > 1 and rank.isdecimal() and int(rank) > 0)


@contextmanager
def _bar(total: int | None, run: _Run, unit: str, desc: str) -> Iterator[Any]:
    """Show a progress bar, if somebody is there to see it; else give None."""
    if run.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bar: Any = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=desc, leave=False)
    with bar:
        yield bar


def _advance(bar: Any, samples: int) -> None:
    """Count a batch, and show how fast samples come."""
    bar.samples = getattr(bar, "samples", 0) + samples
    elapsed = bar.format_dict["elapsed"]
    bar.set_postfix_str(f"{bar.samples / elapsed:.0f} samples/s" if elapsed else "", refresh=False)
    bar.update(1)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(printable(line))


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(printable(f"note: {note}"), err=True)


def _show_plan(averaging: Averaging, run: _Run) -> None:
    """Print what would be done."""
    if run.as_json:
        _print_json(averaging.to_dict() | {"recompute_bn": run.recompute_bn})
        return
    if run.quiet:
        return
    _say(messages.of_plan(averaging, tensors=run.verbose or len(averaging.inputs) == 1))
    if run.recompute_bn:
        _say([f"would recompute BatchNorm over {run.data}"])
    _note(averaging.notes)


def _show_average(report: Report, averaging: Averaging, run: _Run) -> None:
    """Print what was averaged."""
    if run.verbose:
        _say(messages.of_tensors(averaging))
    _say(messages.of_average(report))
    _note(report.notes)


def _print_json(content: object) -> None:
    import json

    click.echo(json.dumps(content, indent=2))


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    """Unwind as for an error, so that no temporary file remains."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command; the entry point of `swa-avg`."""
    # torch says so at its import, and means nothing by it that matters here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end_on_signal)
    sys.exit(_run())


def _run() -> int:
    """Run the command and turn whatever it raises into an exit code."""
    ctx: click.Context | None = None
    try:
        # Not command.main: it ends the process itself when nobody reads its output.
        with command.make_context("swa-avg", sys.argv[1:]) as ctx:
            command.invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SwaAvgError as error:
        _show_error(error, everything=bool(ctx and ctx.params["verbose"]))
        return 2 if isinstance(error, SelectionError) else 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # Nobody reads our output: not worth a message, and none must come at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (OSError, MemoryError) as error:
        click.echo(printable(f"error: {error or type(error).__name__}."), err=True)
        return 1
    return 0


def _show_error(error: SwaAvgError, everything: bool) -> None:
    shown = error.disagreements if everything and isinstance(error, MismatchError) else (error,)
    for one in shown:
        click.echo(f"error: {one}", err=True)
