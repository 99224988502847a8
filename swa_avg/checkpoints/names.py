"""Parses the path of a checkpoint: epoch, step, part, metrics, average, and series.

A path is parsed once into a `Name`. The meaning of words is defined in `words`. This module
does not open files; values recorded inside a checkpoint take precedence over its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from swa_avg.checkpoints import words
from swa_avg.checkpoints.pieces import Form, Tokens, form_of, times
from swa_avg.checkpoints.words import Label

Number = int | float

_MULTIPLES = {"k": 1_000, "K": 1_000, "m": 1_000_000, "M": 1_000_000, "B": 1_000_000_000}
_NEGATIONS = ("no", "non", "not", "without", "wo")
# The meanings of numbers that change from one checkpoint of a series to the next.
_RUNNING = ("epoch", "step", "count", "number", "time", "part", "metric", "average")
# How likely a number without a word is the position of a checkpoint in the run.
_TIME, _FREE, _SCALED, _GLUED = 4, 3, 2, 1


@dataclass(frozen=True)
class Name:
    """A parsed path.

    Attributes:
        path: The path.
        series: The name without its numbers, which the checkpoints of a run share.
        pattern: A `glob` pattern for the series, which begins where `text` does.
        part_pattern: The same for one part of the model over the whole run.
        text: The parsed end of the path, without the folders that all inputs share.
        shape: The series without the other numbers in it that may change.
        whole: The series without the words that mark a part of a model.
        epoch: The number next to a word for epoch, or None.
        step: The number next to a word for step, iteration, update or batch, or None.
        count: The number next to a word for tokens or samples, or None.
        number: The number that gives the position in the run if no word marks one, or None.
        version: The version that Lightning appends to an existing name (`-v1`), or 0.
        parts: The words that mark a part of a model, with numbers: rank 0, shard 1.
        metrics: Metrics by their labels.
        average: The word that marks an average, or empty.
        role: The word that marks a checkpoint without a number (best, last), or empty.
    """

    path: Path
    text: str
    series: str
    pattern: str
    part_pattern: str
    shape: str
    whole: str
    epoch: Number | None = None
    step: Number | None = None
    count: Number | None = None
    number: Number | None = None
    version: int = 0
    parts: tuple[tuple[str, int], ...] = ()
    metrics: tuple[tuple[Label, float], ...] = ()
    average: str = ""
    role: str = ""

    @property
    def place(self) -> tuple[Number | None, ...]:
        """The numbers that give the position in the run."""
        return self.epoch, self.step, self.count, self.number

    @property
    def is_placed(self) -> bool:
        """Whether any number gives the position in the run."""
        return any(value is not None for value in self.place)

    def metric(self, name: str) -> float | None:
        """Return the value of a metric; if several labels match, the shortest is used."""
        called = [
            (len(label.words), value) for label, value in self.metrics if label.is_called(name)
        ]
        return min(called)[1] if called else None


def read_all(paths: Sequence[Path]) -> list[Name]:
    """Parse the names of all inputs, without the folders that they share."""
    shared = 0
    for level in zip(*(path.parts[:-1] for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    form = form_of([path.name.removesuffix(path.suffix) for path in paths])
    return [read(path, len(path.parts) - shared, form) for path in paths]


def read(path: Path, depth: int = 1, form: Form = Form.PLAIN) -> Name:
    """Parse a name.

    Args:
        path: The path of a checkpoint.
        depth: The number of last parts of the path to parse; 1 for the name only.
        form: How its numbers are to be read.
    """
    parts = path.parts[-depth:] or (".",)
    suffix = _suffix(parts[-1])
    text = "/".join(parts).removesuffix(suffix)
    return _Reading(text, suffix, path, Tokens(text, form)).result()


def _suffix(name: str) -> str:
    """Return the suffixes of a checkpoint: `.pth.tar`."""
    suffix = ""
    while True:
        rest, dot, last = name.removesuffix(suffix).rpartition(".")
        if not (rest and dot and last.lower() in words.SUFFIXES):
            return suffix
        suffix = f".{last}{suffix}"


@dataclass
class _Reading:
    """The parser of one name, from left to right."""

    text: str
    suffix: str
    path: Path
    tokens: Tokens
    parts: list[tuple[str, int]] = field(default_factory=list)
    metrics: list[tuple[Label, float]] = field(default_factory=list)
    found: dict[str, Number] = field(default_factory=dict)
    of_part: set[int] = field(default_factory=set)

    def result(self) -> Name:
        """Parse the name."""
        average = self._average()
        numbers = [at for at, token in enumerate(self.tokens) if token.kind == "number"]
        for at in numbers:
            if not self.tokens[at].meaning:
                self._read_number(at, averaged=bool(average))
        self._place(numbers)
        series, whole = self._series()
        roles = [token.word for token in self.tokens if token.word in words.ROLES]
        return Name(
            path=self.path,
            text=self.text + self.suffix,
            series=series,
            pattern=self._pattern(parts=True),
            part_pattern=self._pattern(parts=False),
            shape=self._series(running=True)[0],
            whole=whole,
            epoch=self.found.get("epoch"),
            step=self.found.get("step"),
            count=self.found.get("count"),
            number=self.found.get("number"),
            version=int(self.found.get("version", 0)),
            parts=tuple(self.parts),
            metrics=tuple(self.metrics),
            average=average,
            role=roles[-1] if roles else "",
        )

    def _average(self) -> str:
        """Return the word that marks an average; `avg` in `avg_loss` does not."""
        for at, token in enumerate(self.tokens):
            if token.kind != "word" or not words.marks_average(token.text):
                continue
            after, before = self.tokens.word_after(at), self.tokens.word_before(at)
            number = self.tokens.right(at)  # loss_avg_0.3, but acc.ave_2best
            valued = self.tokens.is_number(number) and not self.tokens[number].is_whole
            of_metric = words.is_metric(after) or (valued and words.is_metric(before))
            if not of_metric and before not in _NEGATIONS:
                return token.text
        return ""

    # The meaning of numbers.

    def _read_number(self, at: int, averaged: bool) -> None:
        """Determine the meaning of a number; the most certain rules come first."""
        token, left = self.tokens[at], self.tokens.left(at)
        before = words.said(self.tokens[left].text) if self.tokens.word_before(at) else ""
        glued = at > 0 and self.tokens[at - 1].kind == "word"
        unit = self.tokens.word_at(at + 1)
        scale = _MULTIPLES.get(self.tokens[at + 1].text, 1) if unit else 1
        if self._is_part(at, before):
            return
        kind = self._kind(at, before, glued)
        if kind and token.is_finite and (kind == "epoch" or (token.value * scale).is_integer()):
            self._take(at, kind, scale)
        elif before == "v" and glued and token.is_whole:
            token.meaning = "version" if self.tokens.right(at) < 0 else "literal"
            self.found.setdefault("version", int(token.value))
        elif token.is_whole and self._counts_averaged(at, before, averaged):
            token.meaning = "average"
        elif token.is_counted(scale) and unit != "b" and not words.is_metric(before):
            token.look = _SCALED  # 1.5M steps, but 0.5B is a size
        elif self._is_metric(at, before, glued):
            return
        elif before in words.SETTINGS and self.tokens[self.tokens.left(at)].depth == token.depth:
            token.meaning = "literal" if not (before in words.AVERAGES and token.is_whole) else ""
        if not token.meaning and token.is_whole:
            token.look = _TIME if token.is_time else self._look(before, glued, unit, scale)

    def _is_part(self, at: int, before: str) -> bool:
        """Parse the part of a model that a file holds: rank_0, 00001-of-00002."""
        token, left, of = self.tokens[at], self.tokens.left(at), self.tokens.right(at)
        label, span, kind = "", range(0), self.tokens.word_before(left)
        of_pipe = before == "stage" and kind in words.PIPES
        if self.tokens.word_at(of) == "of" and self.tokens.is_number(self.tokens.right(of)):
            end = self.tokens.right(of)
            self.tokens[end].meaning = "literal"
            if before in words.KINDS:
                return False  # epoch_9_of_10
            named = before in words.PARTS
            label, span = before if named else "part", range(left if named else at, end + 1)
        elif token.is_whole and (before in words.PARTS or of_pipe):
            label, span = before, range(left, at + 1)
            if (before == "rank" and kind in words.RANK_KINDS) or of_pipe:
                label, span = f"{kind}_{before}", range(self.tokens.left(left), at + 1)
        elif self._goes_on(at, left):
            label, span = self.parts[-1][0], range(left, at + 1)
        if not label or not token.is_whole:
            return False
        token.meaning = "part"
        self.parts.append((label, int(token.value)))
        self.of_part.update(span)
        if self.tokens.is_separator(span.start - 1):
            self.of_part.add(span.start - 1)
        return True

    def _goes_on(self, at: int, left: int) -> bool:
        """Return whether a number is a second rank: the pipeline rank in mp_rank_00_001."""
        follows = left >= 0 and self.tokens[left].meaning == "part"
        of_rank = follows and self.tokens.word_before(left) == "rank"
        return of_rank and self.tokens.joint(at) == "_"

    def _kind(self, at: int, before: str, glued: bool) -> str:
        """Return epoch, step or count, if a word next to a number has that meaning."""
        after, right = self.tokens.word_at(at + 1), self.tokens.right(at)
        if before in words.LETTERS and glued and not after:
            apart = (
                self.tokens.left(at) == 0
                or self.tokens[self.tokens.left(at) - 1].kind == "separator"
            )
            kind = words.LETTERS[before]
            return kind if apart and (kind == "epoch" or "epoch" in self.found) else ""
        if before in words.KINDS:
            return words.KINDS[before]
        if self.tokens.is_number(self.tokens.right(right) if right >= 0 else -1):
            return ""  # the word belongs to the next number
        if after in words.KINDS:
            return words.KINDS[after]
        return "" if glued else words.KINDS.get(self.tokens.word_after(at), "")

    def _counts_averaged(self, at: int, before: str, averaged: bool) -> bool:
        """Return whether a number counts averaged checkpoints: avg_5, 10best, last10.avg."""
        if before in words.COUNTED_AVERAGES or self.tokens.word_at(at + 1) == "best":
            return True
        return averaged and before in words.ROLES

    def _is_metric(self, at: int, before: str, glued: bool) -> bool:
        """Parse a metric: `val_loss=0.12`, `acc0.93`, `02-0.12`."""
        token, left, right = self.tokens[at], self.tokens.left(at), self.tokens.right(at)
        if not token.is_whole and self.tokens.word_at(at + 1) not in ("", *_MULTIPLES):
            token.meaning = "literal"  # mobilenet0.5x
            return True
        tail = next((piece.lower() for piece in reversed(words.in_camel_case(
            self.tokens[left].text if before else ""))), "")  # fmt: skip
        known = words.is_metric(before) or words.is_metric(tail)
        of_label = known or words.is_metric(before + token.text)
        if of_label and glued and token.is_whole and self.tokens.is_number(right):
            token.meaning = "label"  # the 1 of top1_76.3 and f1=0.9
            return True
        labelled = left >= 0 and self.tokens[left].meaning == "label"
        assigned = left >= 0 and self.tokens.joint(at)[:1] in ("=", ":")
        if before in words.SETTINGS and not known:
            return False
        if not (known or labelled or assigned or not token.is_whole):
            return False
        value, joint = token.value, self.tokens.joint(at)
        if joint[1:] == "-" and joint[0] in "=_:":
            self.tokens[at - 1].meaning = "unit"  # a sign
            value = -value
        self.metrics.append((self._label(at), value))
        # A whole number next to an unknown word may be a setting.
        token.meaning = "metric" if known or labelled or not token.is_whole else "literal"
        return True

    def _label(self, at: int) -> Label:
        """Return the words before a metric that can belong to its name."""
        pieces: list[tuple[str, str]] = []
        here = at
        while (left := self.tokens.near(here)) >= 0:
            token = self.tokens[left]
            if token.kind == "number" and token.meaning != "label":
                break
            pieces.append((token.text.lower(), self.tokens.near_joint(left)))
            here = left
        pieces.reverse()
        return Label(tuple(word for word, _ in pieces), tuple(joint for _, joint in pieces))

    def _look(self, before: str, glued: bool, unit: str, scale: int) -> int:
        """Return how likely a number is the position of a checkpoint in the run."""
        if unit:
            return _SCALED if scale > 1 and unit != "b" else 0  # 7b is a size
        if glued and before not in words.NOUNS and before not in words.ROLES:
            return _GLUED
        return _FREE

    def _place(self, numbers: Sequence[int]) -> None:
        """Choose the numbers that give the position if no word marks one."""
        if not {"epoch", "step", "count"} & self.found.keys():
            self._place_without_words(numbers)
        for at in numbers:  # checkpoint-500/epoch_3.pt
            noun = self.tokens.word_before(at) in words.CHECKPOINT_NOUNS
            inner = self.tokens[at].depth == self.tokens[-1].depth
            if noun and not inner and self.tokens[at].look and not self.tokens[at].meaning:
                self._take(at, "number")
            if inner and self.tokens[at].is_time and not self.tokens[at].meaning:
                self.tokens[at].meaning = "time"

    def _place_without_words(self, numbers: Sequence[int]) -> None:
        deepest = self.tokens[-1].depth if self.tokens else 0
        for depth in range(deepest, -1, -1):
            there = [
                at for at in numbers if self.tokens[at].look and self.tokens[at].depth == depth
            ]
            if depth < deepest:
                there = [at for at in there if self._names_checkpoint(at)]
            if not there:
                continue
            best = max(self.tokens[at].look for at in there)
            if best == _GLUED and any(t.word in words.ROLES for t in self.tokens.part(depth)):
                return  # resnet50_best
            *others, last = [at for at in there if self.tokens[at].look == best]
            if others and self._is_epoch_and_step(others[-1], last):
                self._take(others[-1], "epoch")
                self._take(last, "step")
            else:
                unit = self.tokens[last + 1].text if best == _SCALED else ""
                self._take(last, "number", _MULTIPLES.get(unit, 1))
            return
        version = [at for at in numbers if self.tokens[at].meaning == "version"]
        if version and not self.metrics and not any(t.word in words.ROLES for t in self.tokens):
            self._take(version[0], "number")
            self.found.pop("version")

    def _take(self, at: int, meaning: str, scale: int = 1) -> None:
        """Record a number with its meaning and the unit after it: 100k."""
        self.tokens[at].meaning = meaning
        self.found[meaning] = times(self.tokens[at].value, scale)
        if scale > 1:
            self.tokens[at + 1].meaning = "unit"

    def _names_checkpoint(self, at: int) -> bool:
        """Return whether the number of a folder marks a checkpoint: 1000/ or checkpoint-1000/."""
        depth = self.tokens[at].depth
        alone = all(t.kind == "separator" or t is self.tokens[at] for t in self.tokens.part(depth))
        return alone or self.tokens.word_before(at) in words.CHECKPOINT_NOUNS

    def _is_epoch_and_step(self, first: int, last: int) -> bool:
        """Return whether two numbers have the form of fairseq: checkpoint_EPOCH_UPDATE."""
        return self.tokens.word_before(first) == "checkpoint" and self.tokens.left(last) == first

    # The series.

    def _series(self, running: bool = False) -> tuple[str, str]:
        """Return the series, and the series without the words for parts.

        Args:
            running: Also remove the numbers of the file name that have no known meaning.
        """
        texts, deepest = [], self.tokens[-1].depth if self.tokens else 0
        for at, token in enumerate(self.tokens):
            loose = running and token.look and token.depth == deepest
            dropped = token.meaning == "unit" or self._is_of_version(at)
            number = token.meaning in _RUNNING or (loose and not token.meaning)
            texts.append("" if dropped else "#" if number else token.text)
        whole = [text for at, text in enumerate(texts) if at not in self.of_part]
        return "".join(texts), "".join(whole)

    def _pattern(self, parts: bool) -> str:
        """Return a `glob` pattern for the series; `parts` includes all parts of the model."""
        pattern = ""
        for at, token in enumerate(self.tokens):
            kept = token.meaning == "part" and not parts
            if token.meaning in ("metric", "unit", "version"):
                pattern += "*"
            elif token.meaning in _RUNNING and not kept:
                pattern += "[0-9]*"
            elif not self._is_of_version(at):
                pattern += escape(token.text)
        return re.sub(r"\*+", "*", pattern) + escape(self.suffix)

    def _is_of_version(self, at: int) -> bool:
        """Return whether a token is the `-`, the `v` or the number of a `-v1`."""
        return any(token.meaning == "version" for token in self.tokens[at : at + 3])
