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
from typing import NamedTuple

# Options that texts name without a value, and their parameters.
_FLAGS = {
    "ema": "ema=True",
    "no-ema": "ema=False",
    "keep-wrapper": "keep_wrapper=True",
    "force": "force=True",
    "distances": "distances=True",
    "verify": "verify=True",
    "recompute-bn": "batchnorm=BatchNorm(...)",
    "model": "model",
    "data": "data",
}
_OF_CHOICE = ("last", "epochs", "best", "exclude")
_WITH_VALUES = (
    *_OF_CHOICE,
    *("start-from", "minus", "key", "dtype", "bn-buffers", "max-shard-size", "threads"),
    *("metric", "mode", "amp"),
)
_NAMES = {f"--{name}": name for name in (*_FLAGS, *_WITH_VALUES)} | {"-o": "output"}
# A value as a shell reads it: in quotes, or of safe characters, without punctuation after it.
_VALUE = r"(?!-)(?:'[^']*'(?:\"'\"'[^']*')*|[\w@%+=:,./*?\[\]-]*[\w@%+=*?\]/:])"
_OPTION = (
    rf"(?:--(?:{'|'.join(_FLAGS)})(?![\w-])"
    rf"|(?:--(?:{'|'.join(_WITH_VALUES)})|-o)(?![\w-])(?: {_VALUE})?)"
)
_OPTIONS = re.compile(rf"(?<![\w-]){_OPTION}(?: {_OPTION})*")
# Other words of the command, and those of the API.
_WORDS = {
    " MOD:ATTR": "",
    "-v lists all": "`disagreements` has all",
    "Run the command again": "Try again",
    "run the command again": "try again",
    "Add this function to the module of the data, or name it with --forward": "Give this "
    "function as forward",
}


def as_parameters(text: str) -> str:
    """Return a text with the parameters of the API in place of the options of the command."""
    for of_command, of_api in _WORDS.items():
        text = text.replace(of_command, of_api)
    text = re.sub(r" with -o(?=$|[,.;:)])", "", text)
    return _OPTIONS.sub(_parameters, text) if "-" in text else text


def _parameters(found: re.Match[str]) -> str:
    """Return the parameters for options that stand side by side."""
    given: dict[str, list[str]] = {}
    for option in re.findall(_OPTION, found[0]):
        name, _, value = option.partition(" ")
        given.setdefault(_NAMES[name], []).extend([_quoted(value)] if value else [])
    of_choice = [f"{name}={_one(given[name]) or '...'}" for name in given if name in _OF_CHOICE]
    made = []
    for name, values in given.items():
        if name in _FLAGS:
            made.append(_FLAGS[name])
        elif name in _OF_CHOICE:
            made.append(f"choice=Choice({', '.join(of_choice)})")
        else:
            made.append(name.replace("-", "_") + (f"={_one(values)}" if values else ""))
    return ", ".join(dict.fromkeys(made))


def _one(values: Sequence[str]) -> str:
    return f"({', '.join(values)})" if len(values) > 1 else "".join(values)


def _quoted(value: str) -> str:
    """Return a value of the command line as one of Python."""
    text = value.replace("'\"'\"'", "\0").replace("'", "").replace("\0", "'")
    return text if text.isdecimal() else f'"{text}"'


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


def kind_of(value: object) -> str:
    """Return the name of a value's type, or of the class that it is, for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class Texts(NamedTuple):
    """The texts of an error, with the options of the command."""

    found: str
    expected: str
    remedy: str


class SwaAvgError(Exception):
    """Base of every error that swa-avg raises on purpose.

    Its text is "FILE: TENSOR: found, expected …. Remedy.", and names the parameters of the API.

    Attributes:
        file: The file it was found in.
        tensor: The name of the tensor it was found in.
        texts: What was found, what should have been there, and what the user can do, with
            the options of the command.
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
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.texts = Texts(found, expected, remedy)
        super().__init__(found)

    @property
    def found(self) -> str:
        """What was found."""
        return as_parameters(self.texts.found)

    @property
    def expected(self) -> str:
        """What should have been there."""
        return as_parameters(self.texts.expected)

    @property
    def remedy(self) -> str:
        """What the user can do."""
        return as_parameters(self.texts.remedy)

    def __str__(self) -> str:
        return self._line(Texts(self.found, self.expected, self.remedy))

    def of_command(self) -> str:
        """Return the line that the command prints, which names its options."""
        return self._line(self.texts)

    def _line(self, texts: Texts) -> str:
        place = [text for text in (self.file, self.tensor) if text is not None]
        line = ": ".join([*place, texts.found])
        if texts.expected:
            line += f", expected {texts.expected}"
        if texts.remedy:
            line += f". {texts.remedy}"
        return printable(line if line.endswith("?") else line.removesuffix(".") + ".")

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[SwaAvgError], arguments: tuple[object, ...], content: dict[str, object]
) -> SwaAvgError:
    """Return an error that came from another process."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(content)
    return error


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


class AlreadyAveragedError(SelectionError):
    """All inputs are averages that swa-avg wrote."""


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
        found, expected, remedy = first.texts
        super().__init__(
            found,
            file=first.file,
            tensor=first.tensor,
            expected=expected,
            remedy=remedy.removesuffix(".") + also,
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
