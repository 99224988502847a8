"""Notes for the user on what the headers of the checkpoints show, apart from the tensors.

Notes on the choice of the checkpoints are in `series`, those on tensors in `treatments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swa_avg.checkpoints import StateDict, leaf_of, mapping
from swa_avg.errors import listed
from swa_avg.formats import configuration
from swa_avg.pickles import holds_stream, leaves
from swa_avg.planning.treatments import Rules
from swa_avg.storage import is_remote
from swa_avg.tensors import View, same_bytes

_CONFIGURATIONS = ("config.json", "adapter_config.json")
# Entries of configurations that do not change what the weights mean.
_VOLATILE = (
    *("_name_or_path", "transformers_version", "_diffusers_version", "peft_version"),
    *("_commit_hash", "torch_dtype", "dtype", "use_cache", "inference_mode", "revision"),
    "auto_mapping",
)


def header_notes(states: Sequence[StateDict], rules: Rules) -> Iterator[str]:
    """Yield notes for the user on the checkpoints.

    Args:
        states: The state_dicts, in the order of the run.
        rules: The rules for tensors.
    """
    last = states[-1]
    yield from _of_readers(states)
    yield from _on_configurations(states)
    yield from _on_schedule_free(states)
    yield from _on_flat_parameters(last)
    for note in last.notes:
        yield f"{last.checkpoint.path}: {note}"
    yield from _on_averages(last)
    yield from _on_values(states, rules)


def _of_readers(states: Sequence[StateDict]) -> Iterator[str]:
    """Yield the notes that reading the files has made, each once."""
    said: dict[str, list[str]] = {}
    for state in states:
        for note in state.checkpoint.notes:
            said.setdefault(note, []).append(str(state.checkpoint.path))
    for note, (first, *more) in said.items():
        yield f"{first}{f' and {len(more)} more' if more else ''}: {note}"


def _on_flat_parameters(last: StateDict) -> Iterator[str]:
    """Yield a note on flat parameters of FSDP, which may be parts of the model."""
    flat = [name for name in last.views if leaf_of(name).lstrip("_") == "flat_param"]
    if flat:
        yield (
            f"{listed(flat)}: a flat parameter of FSDP, of which each rank may have saved its own "
            "part; average the files of one rank only"
        )


def _on_averages(last: StateDict) -> Iterator[str]:
    """Yield notes on averages in the last checkpoint that are not used."""
    if last.averages:
        where = listed(last.averages)
        yield (
            f"{last.checkpoint.path}: also contains averaged weights, at {where}; not used "
            f"(to average them, use {last.for_average})"
        )
    if last.places.unnamed and not last.ema:
        where = listed(last.places.unnamed)
        yield (
            f"{last.checkpoint.path}: also contains an average, at {where}, whose tensors have no "
            "names; not used"
        )


def _on_values(states: Sequence[StateDict], rules: Rules) -> Iterator[str]:
    """Yield notes on entries of the state_dict that are not tensors."""
    last = states[-1]
    if last.dropped and not rules.wrapper:
        yield (
            f"{listed(last.dropped)}: neither a tensor nor a plain value; left out (to keep it, "
            "use --keep-wrapper)"
        )
    if last.values and not rules.strides:
        yield (
            f"{listed(list(last.values))}: not a tensor; left out, because this format stores "
            "only tensors"
        )
    if not rules.strides:
        return
    streams = [name for name, value in last.values.items() if holds_stream(value)]
    if streams and not rules.wrapper:
        yield (
            f"{listed(streams)}: an io.BytesIO, kept from {last.checkpoint.path}; torch.load "
            "needs weights_only=False to load the output"
        )
    differing = [name for name in last.values if _differs(name, states)]
    if differing:
        yield f"{listed(differing)}: differs between checkpoints; taken from {last.checkpoint.path}"


def _on_configurations(states: Sequence[StateDict]) -> Iterator[str]:
    """Yield a note if the configurations of folders differ, for example lora_alpha."""
    paths = [state.checkpoint.path for state in states]
    if any(is_remote(path) or not path.is_dir() for path in paths):
        return
    for name in _CONFIGURATIONS:
        found = [configuration(path / name) for path in paths]
        keys = dict.fromkeys(key for one in found for key in one)
        differing = [
            key
            for key in keys
            if key not in _VOLATILE and any(one.get(key) != found[-1].get(key) for one in found)
        ]
        if differing and all(found):
            yield (
                f"{name} differs between checkpoints in {listed(differing)}; their weights may "
                "not fit together"
            )


def _on_schedule_free(states: Sequence[StateDict]) -> Iterator[str]:
    """Yield a note if a schedule-free optimizer was in train mode when it was saved.

    Its weights are then those that the gradient is taken at, not those that it evaluates.
    """
    paths = []
    for state in states:
        entries = (mapping(state.checkpoint.tree) or {}).values()
        each = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
        groups = [(mapping(one) or {}).get("param_groups") for one in each]
        of_groups = [group for some in groups if isinstance(some, list) for group in some]
        if any((mapping(group) or {}).get("train_mode") is True for group in of_groups):
            paths.append(str(state.checkpoint.path))
    if paths:
        yield (
            f"{listed(paths)}: saved while the schedule-free optimizer was in train mode, so the "
            "weights are not those that it evaluates; call optimizer.eval() before saving"
        )


def _differs(name: str, states: Sequence[StateDict]) -> bool:
    """Return whether a value may differ between checkpoints; its tensors may have no checksum."""
    value = states[-1].values[name]
    if any(state.values.get(name) != value for state in states[:-1]):
        return True
    tensors = [[state.checkpoint.located(one) for one in leaves(state.values[name])
                if isinstance(one, View)] for state in states]  # fmt: skip
    return not all(same_bytes(refs) for refs in zip(*tensors, strict=True))
