"""Notes for the user on what the headers of the checkpoints show, apart from the tensors.

Notes on the choice of the checkpoints are in `series`, those on tensors in `treatments`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from swa_avg.checkpoints import StateDict, leaf_of, mapping
from swa_avg.errors import listed
from swa_avg.formats import configuration
from swa_avg.pickles import Inert, holds_stream, leaves
from swa_avg.planning.treatments import Rules
from swa_avg.storage import is_remote
from swa_avg.tensors import View, same_bytes

_CONFIGURATIONS = ("config.json", "adapter_config.json")
# Where files keep the settings of a run: Lightning, YOLO, mmengine, fairseq, argparse in scripts.
_SETTINGS = frozenset(
    (
        *("hyper_parameters", "hparams", "args", "train_args", "training_args", "settings"),
        *("config", "cfg", "conf", "opt", "opts", "options", "meta"),
    )
)
_SEEDS = frozenset(["seed", "random_seed", "manual_seed", "rng_seed", "global_seed", "train_seed"])
_MOST_SETTINGS = 1000
# Entries of configurations that do not change what the weights mean.
_VOLATILE = (
    *(
        "_name_or_path",
        "transformers_version",
        "_diffusers_version",
        "peft_version",
        "_commit_hash",
    ),
    *("torch_dtype", "dtype", "use_cache", "inference_mode", "revision", "auto_mapping"),
)


def header_notes(states: Sequence[StateDict], rules: Rules) -> Iterator[str]:
    """Yield notes for the user on the checkpoints."""
    said: dict[str, list[str]] = {}
    for state in states:
        for note in state.checkpoint.notes:
            said.setdefault(note, []).append(str(state.checkpoint.path))
    for note, (first, *more) in said.items():
        yield f"{first}{f' and {len(more)} more' if more else ''}: {note}"
    yield from _on_configurations(states)
    yield from _on_schedule_free(states)
    yield from _on_seeds(states)
    last = states[-1]
    flat = [name for name in last.views if leaf_of(name).lstrip("_") == "flat_param"]
    if flat:
        yield (
            f"{listed(flat)}: a flat parameter of FSDP, of which each rank may have saved its own "
            "part; average the files of one rank only"
        )
    for note in last.notes:
        yield f"{last.checkpoint.path}: {note}"
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
    if last.dropped and not rules.wrapper:
        names = listed(last.dropped)
        yield (
            f"{names}: neither a tensor nor a plain value; left out (to keep it, use "
            "--keep-wrapper)"
        )
    if last.values and not rules.strides:
        yield (
            f"{listed(list(last.values))}: not a tensor; left out, because this format stores "
            "only tensors"
        )
    streams = [name for name, value in last.values.items() if holds_stream(value)]
    if streams and rules.strides and not rules.wrapper:
        yield (
            f"{listed(streams)}: an io.BytesIO, kept from {last.checkpoint.path}; torch.load "
            "needs weights_only=False to load the output"
        )
    differing = [name for name in last.values if _differs(name, states)]
    if differing and rules.strides:
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


def _on_seeds(states: Sequence[StateDict]) -> Iterator[str]:
    """Yield a note if the settings in the files have different seeds."""
    each = [_seeds(state.checkpoint.tree) for state in states]
    for place in each[-1]:
        last = each[-1][place]
        others = [number for number, seeds in enumerate(each) if seeds.get(place, last) != last]
        if others:
            first, end = (states[number].checkpoint.path for number in (others[0], -1))
            yield (
                f"{place} is {each[others[0]][place]} in {first} and {last} in {end}; unless the "
                "run went on with another seed, these are several runs, whose weights have no "
                "useful mean"
            )
            return


def _seeds(tree: object) -> dict[str, int]:
    """Return the seeds among the settings of a run by their dotted paths."""
    found: dict[str, int] = {}
    there = [("", tree)]
    seen: set[int] = set()
    for path, value in there:  # grows; a small file can make endlessly many paths
        state = value.state if isinstance(value, Inert) else None  # argparse.Namespace
        entries = state if isinstance(state, dict) else mapping(value) or {}
        if id(value) in seen or len(there) > _MOST_SETTINGS:
            continue
        seen.add(id(value))
        for name, item in itertools.islice(entries.items(), _MOST_SETTINGS):
            called = name.lower() if isinstance(name, str) else ""
            if path and called in _SEEDS and type(item) is int:
                found[f"{path}{name}"] = item
            elif isinstance(item, dict | Inert) and (path or called in _SETTINGS):
                there.append((f"{path}{name}.", item))
    return found


def _differs(name: str, states: Sequence[StateDict]) -> bool:
    """Return whether a value may differ between checkpoints; its tensors may have no checksum."""
    value = states[-1].values[name]
    if any(state.values.get(name) != value for state in states[:-1]):
        return True
    tensors = [[state.checkpoint.located(one) for one in leaves(state.values[name])
                if isinstance(one, View)] for state in states]  # fmt: skip
    return not all(same_bytes(refs) for refs in zip(*tensors, strict=True))
