"""Fixtures of several test modules, and the profile of hypothesis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from injection import Commands

# No deadlines: the machines that run these tests are shared, and a slow example is not wrong.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """What runs the command with faults put into it."""
    try:
        made = Commands(tmp_path_factory.mktemp("faults"))
    except LookupError as missing:
        pytest.skip(str(missing))
    yield made
    made.close()
