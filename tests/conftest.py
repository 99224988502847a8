"""Fixtures of several test modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import Commands


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """What runs the command with faults put into it."""
    try:
        made = Commands(tmp_path_factory.mktemp("faults"))
    except LookupError as missing:
        pytest.skip(str(missing))
    yield made
    made.close()
