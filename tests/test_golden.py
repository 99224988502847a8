"""What averages are, to the bit: as they were when the kernel computed with torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make

RECORDED = json.loads(make.RECORDED.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", make.CASES)
def test_not_a_bit_of_an_average_has_changed(tmp_path: Path, name: str) -> None:
    """All dtypes, strides, subnormals, signed zeros, NaN in all inputs, weights, other dtypes."""
    found = make.averaged(tmp_path, make.CASES[name])
    assert sorted(found) == sorted(RECORDED[name])
    wrong = [tensor for tensor, value in found.items()
             if make.described(value) != RECORDED[name][tensor]]  # fmt: skip
    assert not wrong
