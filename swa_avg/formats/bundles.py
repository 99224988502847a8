"""Folders of frameworks that bundle weights with other files.

A bundle has files of weights in known places. An output of the same kind is a copy of the
last bundle with other weights, so this module only reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from swa_avg.errors import FormatError, listed
from swa_avg.formats import single
from swa_avg.formats.checkpoint import (
    Checkpoint,
    Components,
    Headers,
)
from swa_avg.formats.components import (
    PLACE_IN_RUN,
    TRAINER_STATE,
    is_inside,
    located,
    trainer_state,
)
from swa_avg.pickles import Budget
from swa_avg.storage import InputFile
from swa_avg.tensors import Tensor

_MEGATRON_DEEPSPEED = (
    "Merge them with Megatron-DeepSpeed's tools/convert_checkpoint/deepspeed_to_megatron.py "
    "--target_tp 1 --target_pp 1"
)
_MEGATRON = (
    "Merge them with Megatron-LM's tools/checkpoint/convert.py "
    "--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1"
)


@dataclass(frozen=True)
class _Kind:
    """A kind of folder.

    Attributes:
        name: The framework.
        weights: The pattern of the paths of files with weights.
        sign: The pattern of a file that identifies the folder; empty if it is the weights.
        several: Whether each file is a model; otherwise several files are parts of one.
        without: The patterns of files with optimizer state. An output needs none of them.
        parts: The pattern of files with parts of the model; such a folder is refused.
        others: The pattern of files with other weights, which are copied as they are.
        remedy: How to merge the parts; `{run}` and `{name}` are the parent and the name of the
            folder with the parts, and `{out}` is the name of the checkpoint.
    """

    name: str
    weights: str
    sign: str = ""
    several: bool = False
    without: tuple[str, ...] = ()
    parts: str = ""
    others: str = ""
    remedy: str = ""


_KINDS = (
    # deepspeed/checkpoint/ds_to_universal.py; the engine loads these and not the model_states.
    _Kind(
        "DeepSpeed (universal checkpoint)",
        "zero/*/fp32.pt",
        parts="zero/*/fp32.pt",
        remedy="Average the checkpoints that ds_to_universal.py made it from",
    ),
    # deepspeed/runtime/engine.py: _get_ckpt_name, and with ZeRO-3 _get_zero_ckpt_prefix.
    _Kind(
        "DeepSpeed (ZeRO-3)",
        "zero_pp_rank_*_model_states.pt",
        parts="zero_pp_rank_*_model_states.pt",
        remedy="Merge them with DeepSpeed's zero_to_fp32.py, and average what it writes: "
        "python {run}/zero_to_fp32.py {run} merged/{out} -t {name}",
    ),
    # deepspeed/runtime/pipe/module.py: ckpt_layer_path; experts: _get_expert_ckpt_name.
    _Kind(
        "DeepSpeed",
        "mp_rank_*_model_states.pt",
        without=("*_optim_states.pt",),
        parts="layer_*model_states.pt",
        remedy=_MEGATRON_DEEPSPEED,
    ),
    # megatron/training/checkpointing.py: get_checkpoint_name.
    _Kind(
        "Megatron-LM",
        "mp_rank_*/model_optim_rng.pt",
        without=("mp_rank_*/distrib_optim.pt",),
        remedy=_MEGATRON,
    ),
    # speechbrain/utils/checkpoints.py: a file for each recoverable.
    _Kind("SpeechBrain", "*.ckpt", sign="CKPT.yaml", several=True),
    # accelerate/utils/fsdp_utils.py: save_fsdp_model, with a file for each model.
    _Kind(
        "accelerate (FSDP)",
        "pytorch_model_fsdp*.bin",
        several=True,
        parts="pytorch_model_fsdp*_rank*.bin",
        remedy="Load it with accelerate, and save it with FSDP's state_dict_type "
        "FULL_STATE_DICT or SHARDED_STATE_DICT",
    ),
    # litgpt/finetune and litgpt/pretrain.py; LoRA and adapters have further suffixes.
    _Kind("LitGPT", "lit_model.pth", others="lit_model.pth.*"),
    _Kind("LitGPT", "lit_model.pth.*"),
)
_LATEST = "latest"  # DeepSpeed's file with the name of the sub-folder to load
_ENGINE = re.compile(r"pytorch_model(_\d+)?")  # accelerate's names of such sub-folders
_MOST_LATEST_BYTES = 1000
_SPEECHBRAIN = "CKPT.yaml"
_MOST_YAML_BYTES = 1_000_000
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_YAML_LINE = re.compile(r" *(['\"]?)([^\s'\"#-][^:'\"]*)\1:(?:\s+([^#\s].*?))?(?:\s+#.*)?\s*")
_LONGEST_YAML_LINE = 1000


def is_folder(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of one of the frameworks."""
    return _found(folder) is not None


def read(folder: Path, headers: Headers) -> Checkpoint:
    """Read the headers of the files of weights in a folder.

    Raises:
        FormatError: A file is damaged, or the folder has only parts of a model.
        FileError: A file cannot be opened.
    """
    found = _found(folder)
    assert found is not None
    home, kind = found
    parts = _matching(home, kind.parts) if kind.parts else []
    files = _matching(home, kind.weights)
    if parts or (len(files) > 1 and not kind.several):
        names = [path.relative_to(home).as_posix() for path in parts or files]
        raise FormatError(
            f"has parts of a model ({kind.name}: {listed(names)})",
            file=folder,
            expected="one file with the whole model",
            remedy=kind.remedy.format(
                run=quote(str(home.parent)), name=quote(home.name), out=quote(folder.name)
            ),
        )
    _refuse_several(folder, home, kind)
    if kind.several:
        return replace(_read_models(home, files, headers), format=f"{kind.name} folder")
    whole = single.open_file(files[0], headers)
    others = [path.name for path in _matching(home, kind.others)] if kind.others else []
    note = f"{listed(others)}: other weights in the folder; not averaged"
    return replace(
        whole,
        path=folder,
        format=f"{kind.name} folder",
        notes=(*whole.notes, note) if others else whole.notes,
        beside=trainer_state(folder),
        without=kind.without,
    )


def _refuse_several(folder: Path, home: Path, kind: _Kind) -> None:
    """Refuse a folder in which accelerate saved several models with DeepSpeed."""
    if home == folder:
        return
    beside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    models = [path.name for path in beside if _matching(path, kind.sign or kind.weights)]
    if len(models) > 1:
        raise FormatError(
            f"has several models ({listed(models)})",
            file=folder,
            remedy="Give the folder of one of them in each checkpoint, as in "
            f"{quote(str(folder / models[0]))}",
        )


def _read_models(folder: Path, files: list[Path], headers: Headers) -> Checkpoint:
    """Read the files of a folder that hold a dict of tensors, each as a component."""
    budget, trees = Budget(), Components()
    taken: list[InputFile] = []
    notes: list[str] = []
    with ExitStack() as opened:
        for path in files:
            if not single.is_checkpoint(path):
                continue  # counters and samplers are saved as text
            model = single.open_file(path, headers, budget)
            tree = located(model)
            if isinstance(tree, dict) and any(isinstance(v, Tensor) for v in tree.values()):
                opened.callback(model.close)
                trees[path.stem] = tree
                taken += model.files
                notes += [f"{path.name}: {note}" for note in model.notes]
            else:
                model.close()
        opened.pop_all()
    beside = numbers_in_yaml(_text(folder / _SPEECHBRAIN, _MOST_YAML_BYTES))
    return Checkpoint(
        folder,
        "",
        trees,
        tuple(taken),
        notes=tuple(notes),
        beside=beside,
        without=(),
        budget=budget,
    )


def _found(folder: Path) -> tuple[Path, _Kind] | None:
    """Return the folder that holds the weights, and its kind."""
    kind = next((k for k in _KINDS if _matching(folder, k.sign or k.weights)), None)
    if kind:
        return folder, kind
    name = _text(folder / _LATEST, _MOST_LATEST_BYTES).strip()
    # accelerate, Lightning and Trainer save with DeepSpeed into a sub-folder of their checkpoint.
    if not name or not is_inside(name) or not (folder / name).is_dir():
        return None
    # Other names of places are checkpoints in a folder of a run.
    is_own = _ENGINE.fullmatch(name) or (folder / TRAINER_STATE).is_file()
    if is_own or not PLACE_IN_RUN.fullmatch(name):
        kind = next((k for k in _KINDS if _matching(folder / name, k.sign or k.weights)), None)
    return (folder / name, kind) if kind else None


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files below a folder that match a pattern of names."""
    first, _, rest = pattern.partition("/")
    found = sorted(path for path in folder.iterdir() if fnmatchcase(path.name, first))
    if rest:
        return [inner for path in found if path.is_dir() for inner in _matching(path, rest)]
    return [path for path in found if path.is_file()]


def _text(path: Path, most: int) -> str:
    """Return the text of a small file; empty if there is none."""
    if not path.is_file():
        return ""
    file = InputFile(path)
    try:
        return file.read(0, min(file.size, most)).decode(errors="replace")
    finally:
        file.close()


def numbers_in_yaml(text: str) -> Mapping[str, object]:
    """Return the numbers under plain keys in a YAML text, nested by indentation.

    Everything else (lists, strings, tags) is skipped, with the lines indented below it.
    """
    root: dict[str, object] = {}
    # The open mapping at each indentation, or None for a skipped block.
    levels: list[tuple[int, dict[str, object] | None]] = [(-1, root)]
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = len(line) - len(line.lstrip(" "))
        while depth <= levels[-1][0]:
            levels.pop()
        parent, below = levels[-1][1], None
        parts = _YAML_LINE.fullmatch(line) if len(line) <= _LONGEST_YAML_LINE else None
        if parent is not None and parts:
            _, key, value = parts.groups()
            if value is None:
                parent[key] = below = dict[str, object]()
            elif re.fullmatch(rf"[-+]?{_NUMBER}", value):
                parent[key] = float(value)
        levels.append((depth, below))
    return root
