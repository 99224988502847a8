"""Notes for the user on the chosen checkpoints: on their places in the run, and on their headers.

A note on several series is in `series`, and those on tensors are in `treatments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

from swa_avg.checkpoints import StateDict, leaf_of, mapping
from swa_avg.errors import listed
from swa_avg.formats import configuration
from swa_avg.pickles import Inert, holds_stream, leaves
from swa_avg.planning.order import Member, grouped, measured
from swa_avg.planning.treatments import Rules
from swa_avg.storage import is_remote
from swa_avg.tensors import View, same_bytes

_GAP = 600  # seconds between two runs
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
    *("_name_or_path", "transformers_version", "_diffusers_version", "peft_version"),
    *("_commit_hash", "torch_dtype", "dtype", "use_cache", "inference_mode", "revision"),
    "auto_mapping",
)


def choice_notes(chosen: Sequence[Member]) -> Iterator[str]:
    """Yield notes on the places of the chosen checkpoints in the run.

    Args:
        chosen: The checkpoints, in the order of the run.
    """
    yield from _on_places(chosen)
    yield from _on_times(chosen)
    yield from _on_averaged_models(chosen)
    placed = [member for member in chosen if member.is_placed]
    if len(chosen) > 1 and not placed and any(member.name.metrics for member in chosen):
        yield (
            "neither the checkpoints nor their names contain an epoch or a step; "
            f"{chosen[-1].path} is used as the last one"
        )


def _on_places(chosen: Sequence[Member]) -> Iterator[str]:
    """Yield notes on checkpoints with the same step, or the same numbers in their names."""
    for (_, shared, _), group in grouped(chosen, _own_place).items():
        if shared and len(group) > 1:
            *paths, last = [str(member.path) for member in group]
            yield f"{listed(paths)} and {last} {shared}, but their weights differ"


def _on_times(chosen: Sequence[Member]) -> Iterator[str]:
    """Yield a note if the last checkpoints were written long before the first ones.

    A run in the folder of an earlier run that had more epochs leaves the last ones of that run.
    Copies of files have new times; only a clear gap counts.
    """
    times = [_written(member) for member in chosen]
    known = [time for time in times if time is not None]
    if len(known) < max(len(times), 3) or not all(member.is_placed for member in chosen):
        return
    for at in range(1, len(known)):
        newer, older = sorted(known[:at]), sorted(known[at:])
        gap = newer[0] - older[-1]
        usual = [after - before for group in (newer, older) for before, after in pairwise(group)]
        if gap > max(_GAP, 3 * max(usual)):
            shown = listed([str(member.path) for member in chosen[at:]])
            _, numbers = measured(chosen)
            last, after = numbers[at - 1], numbers[at]
            fits = last is not None and after is not None and last < after
            option = f"; --epochs :{last} leaves {'them' if len(older) > 1 else 'it'} out"
            yield (
                f"{shown}: written before {chosen[at - 1].path}, possibly by an earlier run"
                f"{option if fits else ''}"
            )
            return


def _written(member: Member) -> float | None:
    """Return the time of the last modification of a checkpoint, if all its files have one."""
    times = [file.modified for file in member.state.checkpoint.files]
    known = [time for time in times if time is not None]
    return max(known) if len(known) == len(times) > 0 else None


def _own_place(member: Member) -> tuple[object, str, object]:
    """Return a key that is unique in a run, with the text for two checkpoints that share it."""
    epoch, step = member.recorded
    if step is not None:  # some scripts count the steps of each epoch
        return "step", f"record the same step, {step}", (epoch, step)
    if epoch is not None and member.name.step is None:
        return "epoch", f"record the same epoch, {epoch}", epoch
    if epoch is None and member.name.is_placed:
        return member.name.series, "have the same numbers in their names", member.name.place
    return id(member), "", None


def _on_averaged_models(chosen: Sequence[Member]) -> Iterator[str]:
    """Yield a note on several states of one AveragedModel, which may be means of the run so far.

    Its counter is the same for a moving average, which a name may say that it is.
    """
    of_torch = [
        str(member.path)
        for member in chosen
        if member.state.counter is not None
        and "ema" not in f"{member.state.where} {member.name.average}".lower()
    ]
    if len(of_torch) > 1:
        yield (
            f"{listed(of_torch)}: states of torch's AveragedModel; unless it keeps a moving "
            "average, each is the mean of the run so far and includes the earlier ones, and the "
            "last one alone is the average (--last 1)"
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
    yield from _on_seeds(states)
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
        for name, item in islice(entries.items(), _MOST_SETTINGS):
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
