"""The command line: parse, call, print, exit codes. The only module that prints.

Imports nothing heavy before it must, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import swa_avg
from swa_avg.errors import SelectionError, SwaAvgError, printable

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Report

_GROUPS = {
    "Read": ("--key",),
    "Average": ("--bn-buffers", "--dtype"),
    "Write": ("--output", "--force"),
    "Report": ("--dry-run", "--json", "--quiet", "--verbose", "--version", "--help"),
    "Speed": ("--threads",),
}


class _GroupedCommand(click.Command):
    """A command whose `--help` shows its options by what they are about."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {
            parameter.opts[-1]: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)
        }
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name])])


@click.command(
    cls=_GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("checkpoints", nargs=-1)
@click.option("--key", metavar="PATH", help="Where the state_dict is in each file (a.b.c).")
@click.option(
    "--bn-buffers",
    type=click.Choice(["last", "first", "mean", "reset"]),
    default="last",
    help="Where BatchNorm statistics come from.  [default: last]",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    help="What floating tensors are written in.  [default: keep]",
)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    default="swa.pt",
    help="The file to write; *.safetensors is one.  [default: swa.pt]",
)
@click.option("-f", "--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; read headers only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show every tensor and every disagreement.")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="How many threads.  [default: cores]"
)
@click.version_option(swa_avg.__version__, prog_name="swa-avg", message="%(prog)s %(version)s")
def command(**options: Any) -> None:
    """Average the checkpoints of a finished training run into one.

    Every weight becomes its exact mean over the CHECKPOINTS (.pt, .pth, .ckpt, .bin,
    .safetensors), rounded once. Nothing in them is executed; they are never changed.

    \b
    Examples:
      swa-avg ckpts/epoch_*.pt -o swa.pt
      swa-avg ckpts/epoch_*.pt -o swa.safetensors --dtype bfloat16
      swa-avg ckpts/*.ckpt --dry-run -v
    """  # noqa: D301 - \b is click's mark: do not wrap the next paragraph
    _average(**options)


def _average(
    checkpoints: tuple[str, ...],
    output: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    threads: int | None,
    **rules: Any,
) -> None:
    if not checkpoints:
        raise click.UsageError("Give the checkpoints to average, as in: swa-avg ckpts/epoch_*.pt")
    from swa_avg.averaging import planned
    from swa_avg.output import AtomicFile

    with planned(checkpoints, output, force=force or dry_run, **rules) as averaging:
        if dry_run:
            _show_plan(averaging, as_json, verbose)
            return
        with AtomicFile(averaging.output, averaging.layout.size) as file:
            with _progress(averaging.plan.bytes_to_read, quiet) as progress:
                report = averaging.write(file, threads=threads, progress=progress)
            file.commit()
    if as_json:
        _print_json(report.to_dict())
    elif not quiet:
        if verbose:
            _show_tensors(averaging)
        _show_report(report)


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Show a bar over bytes, if somebody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="averaging", leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _show_plan(averaging: Averaging, as_json: bool, verbose: bool) -> None:
    """Print what would be done."""
    plan = averaging.plan
    if as_json:
        _print_json(averaging.to_dict())
        return
    click.echo(f"{_counted(len(averaging.inputs), 'checkpoint')}, in this order:")
    for number, source in enumerate(averaging.inputs, 1):
        recorded = [f"{name} {value}" for name, value in source.recorded.items()]
        where = f"at {source.where}" if source.where else ""
        prefix = f"prefix {source.prefix} stripped" if source.prefix else ""
        details = ", ".join(filter(None, [*recorded, where, prefix]))
        click.echo(printable(f"{number:6}  {source.path}  {details}".rstrip()))
    if verbose or len(averaging.inputs) == 1:
        _show_tensors(averaging)
    click.echo(f"would read {_size(plan.bytes_to_read)}: {_treatments(plan.counts)}")
    click.echo(printable(f"would write {_size(averaging.layout.size)} to {averaging.output}"))
    _show_notes(averaging.notes)


def _show_tensors(averaging: Averaging) -> None:
    """Print a line for each tensor."""
    for tensor in averaging.plan.tensors:
        what = f"{tensor.dtype} {list(tensor.shape)}"
        click.echo(
            printable(f"  {tensor.name:<40} {what:<28} {tensor.treatment.value}: {tensor.reason}")
        )


def _show_report(report: Report) -> None:
    """Print what was done, in a few lines."""
    first, last = report.inputs[0], report.inputs[-1]
    of = first.path if len(report.inputs) == 1 else f"{first.path} … {last.path}"
    click.echo(printable(f"averaged {_counted(len(report.inputs), 'checkpoint')}: {of}"))
    click.echo(f"tensors: {_treatments(report.counts)}")
    _show_notes(report.notes)
    click.echo(printable(f"wrote {report.output} ({_size(report.bytes_written)})"))


def _show_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(printable(f"note: {note}"), err=True)


def _treatments(counts: dict[str, int]) -> str:
    meaning = {
        "averaged": "averaged",
        "kept": "BatchNorm buffers kept apart",
        "reset": "BatchNorm buffers reset",
        "copied": "copied",
    }
    return ", ".join(f"{counts[name]} {words}" for name, words in meaning.items() if counts[name])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _print_json(content: object) -> None:
    import json

    click.echo(json.dumps(content, indent=2))


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    """Unwind as for an error, so that no temporary file remains."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command; the entry point of `swa-avg`."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end_on_signal)
    sys.exit(_run())


def _run() -> int:
    """Run the command and turn whatever it raises into an exit code."""
    try:
        command.main(prog_name="swa-avg", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SwaAvgError as error:
        _show_error(error)
        return 2 if isinstance(error, SelectionError) else 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was written", err=True)
        return 130
    except BrokenPipeError:
        # Nobody reads our output: not worth a message, and none must come at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (OSError, MemoryError) as error:
        click.echo(printable(f"error: {error or type(error).__name__}."), err=True)
        return 1
    return 0


def _show_error(error: SwaAvgError) -> None:
    click.echo(f"error: {error}", err=True)
    more = getattr(error, "disagreements", ())[1:]
    if more and "-v" in sys.argv[1:]:
        for one in more:
            click.echo(f"error: {one}", err=True)
