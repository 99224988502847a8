"""The command line: it parses, calls the library, prints, and turns errors into exit codes."""

from swa_avg.cli.command import run

__all__ = [
    "run",
]
