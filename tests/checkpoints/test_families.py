"""The table of families: every row is found, by its names together, and is in the guide.

`python tests/checkpoints/test_families.py` writes the guide's table anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import swa_avg
from swa_avg.checkpoints.families import FAMILIES, Family
from swa_avg.checkpoints.membership import is_bn_buffer, members
from swa_avg.tensors import DTYPES, Tensor, contiguous_stride

GUIDE = Path(swa_avg.__file__).parent / "guide/tensors.md"
START, END = "<!-- families -->\n", "<!-- end -->\n"


def table() -> str:
    """The families as the guide has them."""
    lines = ["| family | names | defined in | treatment |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        names = ", ".join(f"`{name}`" for name in family.needs)
        if family.also:
            names += "; also " + ", ".join(f"`{name}`" for name in family.also)
        way = family.way.value
        averaged = [name for name in family.averaged if name in (*family.needs, *family.also)]
        if averaged:
            way += "; averaged: " + ", ".join(f"`{name}`" for name in averaged)
        lines.append(f"| {family.name} | {names} | {family.where} | {way} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The guide's page with its table as it should be."""
    before, _, rest = GUIDE.read_text().partition(START)
    return before + START + table() + END + rest.partition(END)[2]


def test_the_guide_has_the_table() -> None:
    """What the guide says of families is what the code does."""
    assert GUIDE.read_text() == written()


def tensor(dtype: str, *shape: int) -> Tensor:
    return Tensor(DTYPES[dtype], shape, contiguous_stride(shape))


def named(family: Family, patterns: tuple[str, ...], before: str) -> dict[str, Tensor]:
    """Tensors with the names of a family, of the dtypes that it needs."""
    made = {}
    for pattern in patterns:
        name = pattern.replace("**", ".rest").replace("*", "weight").replace("#", "0")
        dtype = "uint8" if pattern in family.codes else "float32"
        if pattern in family.integers:
            dtype = "int32"
        made[before + name] = tensor(dtype, 1) if family.single else tensor(dtype, 2, 3)
    return made


@pytest.mark.parametrize("before", ["", "a.b.0."], ids=["at the top", "below"])
def test_each_row_is_found_by_its_names_together(before: str) -> None:
    """No row is hidden by one before it, and none is found when one of its names is missing."""
    for family in FAMILIES:
        tensors = named(family, (*family.needs, *family.also), before)
        found = members(tensors | {f"{before}other": tensor("float32", 2)})
        rest = {name: claimed for name, claimed in found.items() if claimed is not family}
        averaged = named(family, family.averaged, before)
        assert not set(averaged) & set(found), family
        # Another row may claim what only also belongs to this one, never what it needs.
        needed = set(named(family, family.needs, before)) - set(averaged)
        assert needed and not needed & set(rest), (family, rest)
        for missing in family.needs if len(family.needs) > 1 else ():
            some = tuple(name for name in family.needs if name != missing)
            assert family not in members(named(family, some, before)).values(), family


def test_batchnorm_is_told_alike_everywhere() -> None:
    """What the plan calls a BatchNorm statistic is what fingerprints leave out."""
    parts = ("running_mean", "running_var", "num_batches_tracked", "weight", "count")
    for number in range(1 << len(parts)):
        names = [f"n.{part}" for place, part in enumerate(parts) if number >> place & 1]
        tensors = {name: tensor("float32", 3) for name in names}
        found = members(tensors)
        for name in tensors:
            plan = name in found and found[name].name == "BatchNorm statistics"
            assert plan == is_bn_buffer(name, tensors), (name, names)


def test_plain_names_are_in_no_family() -> None:
    """The names of ordinary networks are weights."""
    names = "weight bias in_proj_weight gamma beta alpha scale embed pos_embed cls_token logit"
    assert not members({f"blocks.0.{name}": tensor("float32", 4) for name in names.split()})


if __name__ == "__main__":
    GUIDE.write_text(written())
