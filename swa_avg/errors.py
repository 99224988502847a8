"""The errors that swa-avg raises on purpose.

An error holds where it happened (file, tensor), what was found, what was
expected and what to do about it, and formats these as one line. This module
does not print or exit: `cli` turns an error into a line and an exit code.

Texts are written with the options of the command line. `as_parameters` turns these into the
parameters of the API, which have the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Options of which the parameter is not the name and the value.
_PARAMETERS = {
    "ema": "ema=True",
    "no-ema": "ema=False",
    "keep-wrapper": "keep_wrapper=True",
    "force": "force=True",
    "distances": "distances=True",
    "verify": "verify=True",
    "recompute-bn": "batchnorm=BatchNorm(...)",
}
_OF_CHOICE = ("last", "epochs", "best", "exclude")
_AVERAGES = ("start-from", "minus")
_WITH_VALUES = (*_OF_CHOICE, *_AVERAGES, "key", "dtype", "threads", "metric", "mode", "amp")
_OTHERS = ("bn-buffers", "max-shard-size", "model", "data")
_VALUE = r"('[^']*'|[\w.:*?/\[\]-]*[\w*\]:])"
_OPTION = re.compile(
    rf"(?<![\w-])--({'|'.join((*_PARAMETERS, *_OTHERS))})(?![\w-])(?: MOD:ATTR)?"
    rf"|(?<![\w-])--({'|'.join(_WITH_VALUES)})(?![\w-])(?: {_VALUE}((?: --\2 {_VALUE})*))?"
    rf"|(?<![\w-])-(o)(?![\w-])(?: {_VALUE})?"
    r"|(-v) lists all"
)


def as_parameters(text: str) -> str:
    """Return a text with the parameters of the API in place of the options of the command."""
    return _OPTION.sub(_parameter, text) if "-" in text else text


def _parameter(found: re.Match[str]) -> str:
    plain, name, value, more, _, output, target, verbose = found.groups()
    if verbose:
        return "`disagreements` has all"
    if output:
        return f'output="{target}"' if target else "output"
    if plain:
        return _PARAMETERS.get(plain, plain.replace("-", "_"))
    given = [value, *re.findall(rf"--{name} {_VALUE}", more)] if value else []
    values = [_quoted(one) for one in given]
    shown = f"({', '.join(values)})" if len(values) > 1 else "".join(values)
    if name in _OF_CHOICE:
        return f"choice=Choice({name}={shown or '...'})"
    name = name.replace("-", "_")
    return f"{name}={shown}" if shown else name


def _quoted(value: str) -> str:
    text = value.strip("'")
    return text if text.isdecimal() or text == "NAME" else f'"{text}"'


def printable(text: object) -> str:
    """Return `text` as one line of printable characters.

    Names inside a checkpoint are untrusted input: control characters, ANSI
    escapes and lone surrogates are written as backslash escapes.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few of `names`, with a count of the rest."""
    shown = ", ".join(names[:most])
    rest = len(names) - most
    return f"{shown} and {rest} more" if rest > 0 else shown


def counted(count: int, noun: str) -> str:
    """Return a number with its noun in singular or plural."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{'' if count == 1 else plural}"


def in_bytes(count: float) -> str:
    """Return a number of bytes as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class SwaAvgError(Exception):
    """Base of every error that swa-avg raises on purpose.

    Attributes:
        found: What was found. The message is "FILE: TENSOR: found".
        file: The file it was found in.
        tensor: The name of the tensor it was found in.
        expected: What should have been there.
        remedy: What the user can do.
    """

    def __init__(
        self,
        found: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: str = "",
        remedy: str = "",
    ) -> None:
        self.found = found
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.expected = expected
        self.remedy = remedy
        super().__init__(found)

    def __str__(self) -> str:
        return as_parameters(self.of_command())

    def of_command(self) -> str:
        """Return the line that the command prints, which names its options."""
        place = [text for text in (self.file, self.tensor) if text is not None]
        line = ": ".join([*place, self.found])
        if self.expected:
            line += f", expected {self.expected}"
        if self.remedy:
            line += f". {self.remedy}"
        return printable(line if line.endswith("?") else line.removesuffix(".") + ".")


@contextmanager
def naming(file: object) -> Iterator[None]:
    """Add a file to the errors raised in the block that name none."""
    try:
        yield
    except SwaAvgError as error:
        error.file = error.file or str(file)
        raise


class FileError(SwaAvgError):
    """An input that cannot be opened or read: the system's reason is in `found`."""


class FormatError(SwaAvgError):
    """A file that is not a sound checkpoint: another format, damaged, truncated or hostile."""


class ForeignError(FormatError):
    """A file of another kind that starts like a checkpoint: TorchScript, another zip archive."""


class LayoutError(SwaAvgError):
    """A sound file in which no state_dict, or more than one, was found."""


class SelectionError(SwaAvgError):
    """The choice of checkpoints leaves nothing, or nothing meaningful, to average."""


class ProvenanceError(SwaAvgError):
    """An average whose record of how it was made rules out the requested use."""


class MismatchError(SwaAvgError):
    """Checkpoints that do not agree.

    Attributes:
        disagreements: One error for each disagreement.
    """

    def __init__(self, disagreements: Sequence[SwaAvgError]) -> None:
        first = disagreements[0]
        more = len(disagreements) - 1
        also = f" ({more} more disagreement{'s' if more > 1 else ''}: -v lists all)" if more else ""
        super().__init__(
            first.found,
            file=first.file,
            tensor=first.tensor,
            expected=first.expected,
            remedy=first.remedy.removesuffix(".") + also,
        )
        self.disagreements = tuple(disagreements)


class NotFiniteError(SwaAvgError):
    """NaN or infinity that differs between the inputs, or that rounding produces."""


class OutputError(SwaAvgError):
    """The output cannot be written at the given path or in the requested form."""


class DataError(SwaAvgError):
    """The user's data module, model or forward function failed or does not fit.

    Attributes:
        batch: The number of the batch at which it failed, counted from 0.
        frames: The lines of the traceback, if the user's code raised an exception.
    """

    def __init__(
        self,
        found: str,
        *,
        batch: int | None = None,
        expected: str = "",
        remedy: str = "",
        frames: Sequence[str] = (),
    ) -> None:
        place = "" if batch is None else f"batch {batch}: "
        super().__init__(place + found, expected=expected, remedy=remedy)
        self.batch = batch
        self.frames = tuple(frames)
