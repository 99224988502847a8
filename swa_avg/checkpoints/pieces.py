"""Splits a name into tokens: words, numbers and separators.

This module does not interpret words; `names` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

_CLOCK = r"[T_+ -][0-9]{2}(?:[-:.]?[0-9]{2}){1,2}"
_YEAR_FIRST = (
    rf"(?<![0-9])(?:19|20)[0-9]{{2}}"
    rf"(?:-[0-9]{{2}}-[0-9]{{2}}(?:{_CLOCK})?|[0-9]{{4}}[T_-][0-9]{{4,6}})(?![0-9])"
)
# Two numbers of a date, of which either may be the day, and the year.
_DATE = re.compile(r"(?<![0-9])([0-3][0-9])([-._])([0-3][0-9])\2((?:19|20)[0-9]{2})(?![0-9])")
_POWER = "[1-9][eE][1-9][0-9]?"  # 1e6 steps; an epoch has its own word or letter


def _tokens(time: str) -> re.Pattern[str]:
    """Return the expression for a token; `time` is the one for dates and times."""
    return re.compile(
        rf"(?P<time>{time})"
        r"|(?P<dotted>[0-9]+(?:\.[0-9]+){2,})"  # a version
        rf"|(?P<number>(?<![^\W_]){_POWER}(?![^\W_])"
        r"|[0-9]+(?:\.[0-9]+)?(?:[eE][-+][0-9]+)?|(?<==)(?:nan|inf)\b)"
        r"|(?P<word>[^\W\d_]+)"
        r"|(?P<separator>.)",
        re.DOTALL,
    )


_TOKEN = _tokens(_YEAR_FIRST)
_WITH_DATES = _tokens(
    rf"(?<![0-9])[0-3][0-9](?P<by>[-._])[0-3][0-9](?P=by)(?:19|20)[0-9]{{2}}(?:{_CLOCK})?(?![0-9])"
    rf"|{_YEAR_FIRST}"
)
_WITHOUT_DECIMALS = re.compile(
    r"(?P<number>[0-9]+)|(?P<word>[^\W\d_]+)|(?P<separator>.)", re.DOTALL
)
_PAIR = re.compile(r"([0-9]+)\.([0-9]+)")
_KINDS = {"dotted": "word", "time": "number"}


class Form(Enum):
    """How the numbers in the names of a run are to be read."""

    PLAIN = auto()
    PAIRS = auto()
    DAYS_FIRST = auto()
    MONTHS_FIRST = auto()


_EXPRESSIONS = {
    Form.PLAIN: _TOKEN,
    Form.PAIRS: _WITHOUT_DECIMALS,
    Form.DAYS_FIRST: _WITH_DATES,
    Form.MONTHS_FIRST: _WITH_DATES,
}


def form_of(stems: Sequence[str]) -> Form:
    """Return how the numbers in names are to be read.

    Days come first in dates (`31-05-2024`), or months (`05-31-2024`), if a date shows that.
    `05-06-2024` may be either.
    """
    dates = [(int(date[0]), int(date[2])) for stem in stems for date in _DATE.findall(stem)]
    first, second = ([date[at] > 12 for date in dates] for at in (0, 1))
    if any(first) != any(second):
        return Form.DAYS_FIRST if any(first) else Form.MONTHS_FIRST
    return Form.PAIRS if _are_pairs(stems) else Form.PLAIN


def _are_pairs(stems: Sequence[str]) -> bool:
    """Return whether names are pairs of whole numbers: `1.1000`, an index and a step.

    They are pairs and not decimals if several of them have the same two numbers after the dot.
    """
    found = [_PAIR.fullmatch(stem) for stem in stems]
    if not all(found):
        return False
    after: dict[str, set[str]] = {}
    for match in found:
        if match:
            after.setdefault(match[1], set()).add(match[2])
    return len(after) > 1 and len(set.intersection(*after.values())) > 1


def times(value: float, unit: int) -> int | float:
    """Return a number in a unit, as an integer if it is whole: 1,100,000 for 1.1 million."""
    product = round(value * unit, 3) if unit > 1 else value
    return int(product) if product == product // 1 else product


@dataclass
class Token:
    """A token of a name.

    Attributes:
        kind: word, number or separator.
        text: The text.
        depth: The index of the part of the path that contains it.
        meaning: The meaning of a number after parsing: epoch, step, count, part, metric,
            average, version, number, label (a part of a metric's name) or literal.
        look: How likely a number without a meaning is the position in the run.
        is_time: Whether it is a date and time.
        month_first: Whether the month is before the day in a date with the year at its end.
    """

    kind: str
    text: str
    depth: int
    meaning: str = ""
    look: int = 0
    is_time: bool = False
    month_first: bool = False

    @property
    def word(self) -> str:
        """The word in lower case; empty for other kinds."""
        return self.text.lower() if self.kind == "word" else ""

    @property
    def is_whole(self) -> bool:
        """Whether it is a number of digits only, a power of ten, or a date and time."""
        whole = self.text.isdecimal() or self.is_time or re.fullmatch(_POWER, self.text)
        return self.kind == "number" and bool(whole)

    @property
    def is_finite(self) -> bool:
        """Whether it is a finite number: neither nan nor inf."""
        return self.kind == "number" and self.text[0].isdecimal()

    def is_counted(self, unit: int) -> bool:
        """Return whether it is a decimal that its unit makes a whole number: 1.5M."""
        decimal = unit > 1 and self.is_finite and not self.is_whole
        return decimal and isinstance(times(self.value, unit), int)

    @property
    def value(self) -> float:
        """The value of the number; for a date and time, all its digits, the year first."""
        if not self.is_time:
            return float(self.text)
        sorted_ = r"\4\1\3" if self.month_first else r"\4\3\1"
        return float(re.sub(r"[^0-9]", "", _DATE.sub(sorted_, self.text)))


class Tokens(list[Token]):
    """The tokens of a name in order."""

    def __init__(self, text: str, form: Form = Form.PLAIN) -> None:
        """Split a name into tokens; `/` separates the parts of a path.

        Args:
            text: The name.
            form: How its numbers are to be read.
        """
        depth = 0
        months = form is Form.MONTHS_FIRST
        for match in _EXPRESSIONS[form].finditer(text):
            depth += match[0] == "/"
            kind = _KINDS.get(match.lastgroup or "", match.lastgroup or "")
            time = match.lastgroup == "time"
            self.append(Token(kind, match[0], depth, is_time=time, month_first=months))

    def word_at(self, at: int) -> str:
        """Return the word at an index in lower case, or empty."""
        return self[at].word if 0 <= at < len(self) else ""

    def is_separator(self, at: int) -> bool:
        """Return whether the token at an index is a separator other than `/`."""
        inside = 0 <= at < len(self)
        return inside and self[at].kind == "separator" and self[at].text != "/"

    def left(self, at: int) -> int:
        """Return the index of the next token to the left that is not a separator, or -1."""
        at -= 1
        while self.is_separator(at):
            at -= 1
        return at if at >= 0 and self[at].kind != "separator" else -1

    def right(self, at: int) -> int:
        """Return the index of the next token to the right that is not a separator, or -1."""
        at += 1
        while self.is_separator(at):
            at += 1
        inside = at < len(self) and self[at].kind != "separator"
        return at if inside else -1

    def word_before(self, at: int) -> str:
        """Return the next token to the left if it is a word, otherwise empty."""
        return self.word_at(self.left(at))

    def word_after(self, at: int) -> str:
        """Return the next token to the right if it is a word, otherwise empty."""
        return self.word_at(self.right(at))

    def is_number(self, at: int) -> bool:
        """Return whether the token at an index is a number."""
        return at >= 0 and self[at].kind == "number"

    def joint(self, at: int) -> str:
        """Return the text between a token and the next token to the left."""
        start = at
        while self.is_separator(start - 1):
            start -= 1
        return "".join(token.text for token in self[start:at])

    def near(self, at: int) -> int:
        """Return the index of the token to the left, across folders too: `val/loss=0.12`."""
        left = self.left(at)
        slash = at - 1 >= 0 and self[at - 1].text == "/"
        return self.left(at - 1) if left < 0 and slash else left

    def near_joint(self, at: int) -> str:
        """Return the text between a token and the token that `near` finds."""
        slash = at - 1 >= 0 and self[at - 1].text == "/"
        return "/" if slash else self.joint(at)

    def part(self, depth: int) -> Iterator[Token]:
        """Yield the tokens of one part of the path."""
        return (token for token in self if token.depth == depth)
