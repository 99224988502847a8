"""Finds the family of each tensor of a state_dict by name, and some by dtype too.

Names that the table has come first, then those that people write by hand (`by_hand`). Float8
weights have scales beside them, which are wider. This module does not read tensors and does
not decide how they are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from swa_avg.checkpoints.families import (
    BALANCE,
    BN_COUNTER,
    BN_STATISTICS,
    CODEBOOK,
    COUNTER,
    FAMILIES,
    NOISE,
    OBSERVER,
    QUANTISED,
    QUEUE,
    SPECTRAL,
    STATISTICS,
    Family,
)
from swa_avg.tensors import Group, Kind, Tensor, by_hand

_BY_HAND = {
    group: replace(family, where=group.value)
    for group, family in {
        Group.CODEBOOK: CODEBOOK,
        Group.CENTROIDS: CODEBOOK,
        Group.STATISTICS: STATISTICS,
        Group.VECTORS: SPECTRAL,
        Group.QUEUE: QUEUE,
        Group.NOISE: NOISE,
        Group.COUNTER: COUNTER,
        Group.LARGEST: OBSERVER,
        Group.EXPERTS: BALANCE,
    }.items()
}
_OF_8_BIT = replace(QUANTISED, where="codes of 8 bits and their scales")

# Names of the scales of float8 weights; others have such words too: zero_init, layer_scale.
_SCALE_OF_8_BIT = re.compile(
    r"(?!logit|layer).*(?:scale(?!_shift)|scaling|absmax|zero_?point)", re.IGNORECASE
)


def members(tensors: Mapping[str, Tensor]) -> dict[str, Family]:
    """Return the family of each tensor that belongs to one and is not averaged in it.

    Args:
        tensors: The tensors of a state_dict by name.
    """
    found: dict[str, Family | None] = {}
    # A name belongs to the first family in the table that matches it.
    signs: dict[int, list[_Key]] = {}
    for number, key in _signs(tensors):
        signs.setdefault(number, []).append(key)
    for family, key in ((FAMILIES[n], key) for n in sorted(signs) for key in signs[n]):
        names = {pattern: _filled(pattern, key) for pattern in (*family.needs, *family.also)}
        if _fits(family, names, tensors):
            for pattern, name in names.items():
                if name in tensors:
                    found.setdefault(name, None if pattern in family.averaged else family)
    for name, group in by_hand(tensors, found):
        found.setdefault(name, _BY_HAND[group])
    own = {name: family for name, family in found.items() if family}
    for name in _with_scales(tensors):
        own.setdefault(name, _OF_8_BIT)
    return own


def is_bn_buffer(name: str, tensors: Container[str]) -> bool:
    """Return whether a tensor is a statistic or the counter of a normalisation layer."""
    layer, _, buffer = name.rpartition(".")
    if buffer not in (*BN_STATISTICS, BN_COUNTER):
        return False
    before = f"{layer}." if layer else ""
    return [before + name in tensors for name in (*BN_STATISTICS, "count")] == [True, True, False]


def is_code(tensor: Tensor) -> bool:
    """Return whether a tensor may hold codes of quantised weights."""
    dtype = tensor.dtype
    small = dtype.itemsize == 1 or dtype.kind in (Kind.EXACT, Kind.OPAQUE)
    return small and dtype.name != "bool" and tensor.numel > 1


class _Key(NamedTuple):
    """The text that the patterns of a family match in a name."""

    before: str
    part: str = "*"
    number: str = "#"
    rest: str = ""


def _signs(names: Iterable[str]) -> Iterator[tuple[int, _Key]]:
    """Yield the number of each family whose first pattern matches a name, with the match."""
    names = list(names)
    there = "\n".join(names)
    parts = [part for part in _BY_PART if part in there]
    for name in names:
        numbers = _families_of_leaf(name[name.rfind(".") + 1 :])
        for part in parts:
            if part in name:
                numbers = (*numbers, *_BY_PART[part])
        for number in numbers:
            key = _key(FAMILIES[number].needs[0], name)
            if key is not None:
                yield number, key


def _key(pattern: str, name: str) -> _Key | None:
    """Match a name with a pattern; return the matched text, or None."""
    if "*" not in pattern:
        before = name.removesuffix(pattern)
        return _Key(before) if before != name and before[-1:] in ("", ".") else None
    match = _expression(pattern).fullmatch(name)
    return _Key(**match.groupdict(default="")) if match else None


def _fits(family: Family, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether all required members of a family exist and have the right dtypes."""
    if any(names[pattern] not in tensors for pattern in family.needs):
        return False
    there = {pattern: tensors[names[pattern]] for pattern in family.needs}
    return (
        all(is_code(there[pattern]) for pattern in family.codes)
        and all(there[pattern].dtype.kind is Kind.EXACT for pattern in family.integers)
        and not (family.single and any(tensor.numel != 1 for tensor in there.values()))
    )


def _filled(pattern: str, key: _Key) -> str:
    """Return the name that a pattern gives for the matched text of another name."""
    if "*" not in pattern:
        return key.before + pattern
    name = pattern.replace("**", key.rest).replace("#", key.number)
    return key.before + name.replace("*", key.part)


def _with_scales(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of float8 tensors with scales beside them, and of these scales.

    A model that was only cast to 8 bits has no scales, or parameters of 8 bits called so.
    """
    codes: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype.kind is Kind.FLOAT and tensor.dtype.itemsize == 1:
            codes.setdefault(module_of(name), []).append(name)
            codes.setdefault(name, []).append(name)  # weight and weight.scale
    found: set[str] = set()
    for name, tensor in tensors.items() if codes else ():
        wide = tensor.dtype.kind is Kind.FLOAT and tensor.dtype.itemsize > 1
        if wide and module_of(name) in codes and _SCALE_OF_8_BIT.match(leaf_of(name)):
            found.update((name, *codes[module_of(name)]))
    return found


def module_of(name: str) -> str:
    """Return the part of a tensor's name that names its module: `a.b` for `a.b.weight`."""
    return name.rpartition(".")[0]


def leaf_of(name: str) -> str:
    """Return a tensor's name within its module: `weight` for `a.b.weight`."""
    return name.rpartition(".")[2]


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    """Return the regular expression for a pattern."""
    text = re.escape(pattern).replace(r"\*\*", r"(?P<rest>(?:\..*)?)")
    text = text.replace(r"\*", r"(?P<part>[^.]+)").replace(r"\#", r"(?P<number>[0-9]+)")
    return re.compile(rf"(?P<before>(?:.*\.)?){text}", re.DOTALL)


@lru_cache(maxsize=1024)
def _families_of_leaf(leaf: str) -> tuple[int, ...]:
    """Return the numbers of the families whose first pattern may match a last part of a name."""
    numbers = _BY_LEAF.get(leaf, ())
    if leaf.endswith(_ENDS) or leaf.startswith(_STARTS):
        ends = (n for n, pattern in _LEAVES if "*" in pattern and _key(pattern, leaf))
        numbers = (*numbers, *ends)
    return numbers


def _by_part(patterns: Iterable[tuple[int, str]]) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the patterns that match the rest of a name, by a part of them all."""
    found: dict[str, tuple[int, ...]] = {}
    for number, pattern in patterns:
        if pattern.endswith("**"):
            usual = [part for part in ("lora", "vera", "oft_") if part in pattern]
            part = usual[0] if usual else pattern.strip("*_")[:4]
            found[part] = (*found.get(part, ()), number)
    return found


# Indices for a fast lookup among many names: by the part after the last dot if its pattern
# has no `*`; otherwise by the end or the start of that part, or by a part in the middle.
_FIRST = [(number, family.needs[0]) for number, family in enumerate(FAMILIES)]
_BY_PART = _by_part(_FIRST)
_LEAVES = [(n, first.rpartition(".")[2]) for n, first in _FIRST if not first.endswith("**")]
_ENDS = tuple({leaf.rpartition("*")[2] for _, leaf in _LEAVES if "*" in leaf} - {""})
_STARTS = tuple({leaf.strip("*") for _, leaf in _LEAVES if leaf.endswith("*")})
_BY_LEAF = {
    leaf: tuple(number for number, other in _LEAVES if other == leaf)
    for _, leaf in _LEAVES
    if "*" not in leaf
}
