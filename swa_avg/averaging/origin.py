"""What an average is made from: how often each input counts, and the record in the output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import swa_avg
from swa_avg.checkpoints import (
    Provenance,
    StateDict,
    is_bn_buffer,
    refuse_repeats,
    sources_of,
)
from swa_avg.planning import Base, Options, start_from


def counts_of(bases: Sequence[Base], chosen: Sequence[StateDict]) -> tuple[int, ...]:
    """Return the number of checkpoints that each input counts as; negative if subtracted."""
    return (*(base.weight for base in bases), *(1 for _ in chosen))


def how_made(
    bases: Sequence[Base],
    chosen: Sequence[StateDict],
    options: Options,
    found: Iterable[str],
) -> Provenance:
    """Return the provenance of an average.

    Args:
        bases: The averages of `start_from`.
        chosen: The checkpoints.
        options: The options of the average.
        found: The fingerprints of `chosen`; before the tensors are read, some are unknown.

    Raises:
        ProvenanceError: A checkpoint would count twice.
    """
    before = start_from.sources_in(bases)
    added = sources_of(chosen, found)
    paths = [str(state.checkpoint.path) for state in chosen]
    refuse_repeats(before, zip(added, paths, strict=True))
    last = (chosen or [base.state for base in bases])[-1]
    kept: object = options.bn_buffers
    if not any(is_bn_buffer(name, last.views) for name in last.views):
        kept = None
    elif kept == "last":
        kept = "of the last checkpoint" if chosen else bases[-1].batchnorm
    subtracted = [base.state.checkpoint.path.name for base in bases if base.subtracted]
    described = options.described | ({"minus": subtracted[0]} if subtracted else {})
    return Provenance(swa_avg.__version__, (*before, *added), described, kept)
