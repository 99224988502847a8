"""The command line: parses options, calls the library, prints, turns errors into exit codes."""

from swa_avg.cli.command import run

__all__ = [
    "run",
]
