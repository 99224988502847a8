"""The parts of a Hugging Face folder: its files of weights, and the models that it holds.

The name of a file of weights consists of a stem (`diffusion_pytorch_model`), an optional
variant (`fp16`), and a suffix. Sharded weights have an index, whose name consists of the
same parts.

Most folders hold one model. A sentence-transformers folder lists its modules in
`modules.json`, and a diffusers pipeline lists its models in `model_index.json`. Training
scripts of diffusers save a folder for each model (`unet/`, `unet_ema/`), and PEFT saves a
folder for each named adapter. accelerate saves several models as files of one folder
(`model.safetensors`, `model_1.safetensors`). Each of these models is a component of the
folder. This module reads only file names and small JSON files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from swa_avg.errors import FormatError, SwaAvgError
from swa_avg.formats.checkpoint import PROVENANCE, Checkpoint
from swa_avg.formats.safetensors import unique
from swa_avg.storage import InputFile
from swa_avg.tensors import View

# The names that libraries look for. The first that exists is used; each may be sharded.
_NAMES = (
    "model.safetensors",  # transformers, sentence-transformers, accelerate
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",  # diffusers
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",  # PEFT
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",  # diffusers
    "pytorch_lora_weights.bin",
    "open_clip_model.safetensors",  # OpenCLIP
    "open_clip_pytorch_model.bin",
)
_STEMS = tuple(dict.fromkeys(name.partition(".")[0] for name in _NAMES))
# The stems that change when the output is safetensors and the input is not.
_RENAMED = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}
# Only these names between dots are variants: a run may have checkpoints with names like
# `model.epoch_1.bin`.
_VARIANTS = r"\.(?:b?fp?(?:16|32|8)|b?float16|int[48]|nf4|(?:non?_)?ema)"
_WHOLE = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(?P<variant>{_VARIANTS})?\.(?P<suffix>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<suffix>safetensors|bin))?\.index(?P<variant>\.\w+)?\.json"
)
ROOT = "."  # the component in the folder itself
_MODULES = "modules.json"
_PIPELINE = "model_index.json"
_ROUTER = "router_config.json"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_STEM = "adapter_model"
# Files that a checkpoint of a run contains and a folder of checkpoints does not.
_RUN_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|random_states|rng_state)(_\d+)*\.(bin|pt|pth|pkl|safetensors)"
    rf"|trainer_state\.json|{re.escape(PROVENANCE)}"
)
# Other files of weights beside those of a model, and the state of a run, which they are not.
_OTHER = re.compile(r".+\.(safetensors|bin|pt|pth)")
_STATE = re.compile(
    r"optim|sched|scaler|sampler|random|rng|training_args|train(er|ing)?_state|loader|dl_state"
    r"|tokenizer|vocab|args"
)
_OF_STEM = re.compile(rf"(?P<stem>.+?)(?P<variant>{_VARIANTS})?(-\d+-of-\d+)?\.(safetensors|bin)")
# accelerate's files of several models in one checkpoint.
_SEVERAL = re.compile(r"(?:pytorch_)?model(?P<number>_\d+)?\.(?:safetensors|bin)")
# accelerate's sub-folders for its models, with DeepSpeed and with FSDP.
_OF_ENGINES = re.compile(r"pytorch_model(_fsdp)?(_\d+)?")
# The names of models in diffusers pipelines, and of the folders of its training scripts.
_MODELS = re.compile(
    r"(unet|transformer|controlnet|text_encoder|image_encoder|vae|prior|decoder|vqvae|vqgan"
    r"|adapter|t2iadapter|motion_adapter|unconditional|ema)([-_]?(\d|ema|lora|prior|decoder))*"
    r"|(ema)[-_](unet|transformer|controlnet|prior|decoder|model)"
)
# Names of checkpoints within a run: such a folder is not a component of its parent folder.
PLACE_IN_RUN = re.compile(
    r"(?i)\d+|(.*[^a-z])?(best|last|latest|final)"
    r"|(.*[^a-z])?(checkpoint|ckpt|epoch|ep|step|iter|iteration|model)s?[-_=]?\d.*"
)
# Words that mark the weights as an average.
_AVERAGES = {"ema", "swa", "avg", "average", "averaged"}
_MOST_JSON_BYTES = 100_000_000
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Weights:
    """A file of weights, or the index of its shards.

    Attributes:
        path: The path of the file.
        stem: The first part of its name.
        variant: The variant with its dot (`.fp16`), the number of one of accelerate's models
            (`_1`), or empty.
        suffix: `safetensors` or `bin`; empty if the name of an index has neither.
        is_index: Whether the file is an index.
    """

    path: Path
    stem: str
    variant: str
    suffix: str
    is_index: bool

    @property
    def is_usual(self) -> bool:
        """Whether libraries look for this name by default."""
        return not self.variant and f"{self.stem}.{self.suffix}" in _NAMES

    @property
    def is_adapter(self) -> bool:
        """Whether they are the weights of a PEFT adapter."""
        return self.stem == _ADAPTER_STEM

    @property
    def _stem_written(self) -> str:
        return _RENAMED.get(self.stem, self.stem) if self.suffix == "bin" else self.stem

    def needs_index(self, count: int) -> bool:
        """Return whether `count` safetensors files of a model are found only by an index."""
        alone = f"{self._stem_written}{self.variant}.safetensors"
        return count > 1 or (self.is_index and not is_weights_name(alone))

    def shard_written(self, number: int, count: int) -> str:
        """Return the name of one of the `count` safetensors files of a model."""
        part = f"-{number:05}-of-{count:05}" if self.needs_index(count) else ""
        return f"{self._stem_written}{self.variant}{part}.safetensors"

    @property
    def index_written(self) -> str:
        """The name of the index of these files."""
        return f"{self._stem_written}.safetensors.index{self.variant}.json"


def candidates(folder: Path) -> Iterator[Weights]:
    """Yield the files of weights and indices in a folder, in order of preference."""
    for name in _NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.exists():
                yield _named(path)
    found = [*folder.glob("*.*.safetensors"), *folder.glob("*.*.bin"), *folder.glob("*.index*json")]
    others = [_named(path) for path in sorted(set(found)) if is_weights_name(path.name)]
    yield from sorted(
        (weights for weights in others if not weights.is_usual),
        key=lambda weights: (weights.variant, weights.suffix != "safetensors"),
    )


def is_weights_name(name: str) -> bool:
    """Return whether a name is the name of a file of weights or of an index."""
    return bool(_WHOLE.fullmatch(name) or _INDEX.fullmatch(name))


def _named(path: Path) -> Weights:
    whole, index = _WHOLE.fullmatch(path.name), _INDEX.fullmatch(path.name)
    found = whole or index
    assert found is not None
    return Weights(
        path, found["stem"], found["variant"] or "", found["suffix"] or "", whole is None
    )


def components(folder: Path) -> tuple[str, ...]:
    """Return the paths of the models in a folder; ROOT is the folder itself.

    A model of accelerate is named after its file: `model`, `model_1`. The result is empty if
    the folder is not a checkpoint.
    """
    if several := models_in_files(folder):
        return tuple(several)
    found = [ROOT] if has_weights(folder) else []
    named = list(declared(folder))
    found += [name for name in named if has_weights(folder / name)]
    if not named and (not found or (folder / ADAPTER_CONFIG).exists()):
        found += _saved_apart(folder, adapters=bool(found))
    return tuple(dict.fromkeys(found))


def models_in_files(folder: Path) -> dict[str, Weights]:
    """Return the files of the models that accelerate saved in one folder, by component.

    The result is empty if it did not save several. The files of a run may have the same
    names; only a checkpoint has files with the state of the run beside them.
    """
    if not folder.is_dir():
        return {}
    entries = sorted(folder.iterdir())
    found: dict[str, Weights] = {}
    for path in entries:  # `load_state` takes the safetensors file, if there are two
        match = _SEVERAL.fullmatch(path.name)
        if match:
            suffix = path.suffix.removeprefix(".")
            name, number = f"model{match['number'] or ''}", match["number"] or ""
            stem = path.stem.removesuffix(number) if number else path.stem
            if name not in found or suffix == "safetensors":
                found[name] = Weights(path, stem, number, suffix, False)
    names = ["model", *(f"model_{number}" for number in range(1, len(found)))]
    if len(found) < 2 or set(found) != set(names) or not _has_run_state(folder):
        return {}
    return {name: found[name] for name in names}


def _has_run_state(folder: Path) -> bool:
    """Return whether a folder has files that a checkpoint has, and a folder of a run has not."""
    return any(_RUN_STATE.fullmatch(entry.name) for entry in folder.iterdir())


def weights_of(folder: Path, component: str) -> Weights:
    """Return the file of weights, or the index, of a component of a folder."""
    several = models_in_files(folder)
    if component in several:
        return several[component]
    return next(candidates(folder if component == ROOT else folder / component))


def component_of(path: Path) -> str:
    """Return which model of the checkpoint around it a file or folder is; empty for none.

    An adapter is a checkpoint by itself, whatever is around it.
    """
    try:
        folder = path if path.is_dir() else path.parent
        if folder is path or is_weights_name(path.name):
            inner = folder.name in components(folder.parent)
            if inner and not (folder / ADAPTER_CONFIG).exists():
                return folder.name
        if folder is path and _OF_ENGINES.fullmatch(path.name) and not has_weights(path):
            return path.name if _has_run_state(path.parent) else ""
        several = None if folder is path else _SEVERAL.fullmatch(path.name)
        name = f"model{several['number'] or ''}" if several else ""
        if name and name in models_in_files(folder):
            return name
    except (OSError, SwaAvgError):
        pass  # what is around a checkpoint need not be sound
    return ""


def other_weights(first: Weights) -> list[str]:
    """Return the names of files beside a model's own weights that seem to hold others.

    Examples are a value head, LLaVA's `non_lora_trainables.bin`, and an adapter in the folder
    of a whole model. Copies in another precision or format are not among them.
    """
    own = _RENAMED.get(first.stem, first.stem)
    found = []
    for path in sorted(first.path.parent.iterdir()):
        if not _OTHER.fullmatch(path.name) or _STATE.search(path.name) or not path.is_file():
            continue
        same = _OF_STEM.fullmatch(path.name)
        alike = same is not None and _RENAMED.get(same["stem"], same["stem"]) == own
        if not alike or (same and "ema" in (same["variant"] or "") and path != first.path):
            found.append(path.name)
    return found


def has_weights(folder: Path) -> bool:
    """Return whether a folder directly contains weights."""
    return next(candidates(folder), None) is not None


def declared(folder: Path) -> Iterator[str]:
    """Yield the paths of the sub-folders that the folder's JSON files list as models."""
    if (folder / _MODULES).exists():
        modules = read_json(folder / _MODULES)
        paths = (module.get("path") for module in modules if isinstance(module, dict))
        for path in paths if isinstance(modules, list) else ():
            if isinstance(path, str) and path and is_inside(path):
                inner = str(PurePosixPath(path))
                yield inner
                yield from _routed(folder, inner)
        yield from _routed(folder, ROOT)
    if (folder / _PIPELINE).exists():
        index = read_json(folder / _PIPELINE)
        for name, kind in index.items() if isinstance(index, dict) else ():
            if isinstance(kind, list) and is_inside(name) and (folder / name).is_dir():
                yield name


def _routed(folder: Path, path: str) -> Iterator[str]:
    """Yield the paths of the modules that a router of sentence-transformers lists."""
    config = folder / path / _ROUTER
    if not config.exists():
        return
    content = read_json(config)
    types = content.get("types") if isinstance(content, dict) else None
    for name in types if isinstance(types, dict) else ():
        if is_inside(name):
            yield name if path == ROOT else f"{path}/{name}"


def _saved_apart(folder: Path, adapters: bool) -> list[str]:
    """Return the sub-folders in which a run saved its models separately.

    Args:
        folder: The parent folder.
        adapters: Look only for PEFT adapters, because the folder itself holds one.
    """
    entries = sorted(folder.iterdir())
    names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    places = [name for name in names if PLACE_IN_RUN.fullmatch(name)]
    if places and not adapters:
        return []
    found = [name for name in names if name not in places and has_weights(folder / name)]
    adapted = [name for name in found if (folder / name / ADAPTER_CONFIG).exists()]
    if adapters or adapted == found:
        return adapted
    known = any(map(_MODELS.fullmatch, found)) or any(averages(found).values())
    return found if known or _has_run_state(folder) else []


def averages(names: Iterable[str]) -> dict[str, str | None]:
    """Map each component whose name marks an average to the component it is an average of.

    The value is None if there is no such component.
    """
    words = {name: re.split(r"[-_.]", name.lower()) for name in names}
    rest = {name: [word for word in words[name] if word not in _AVERAGES] for name in words}
    raw = [name for name in words if words[name] == rest[name]]
    found: dict[str, str | None] = {}
    for name in words:
        if name not in raw:
            # A component named just `ema` is the average of the only other model.
            of = [one for one in raw if rest[one] == rest[name]] or ([] if rest[name] else raw)
            found[name] = of[0] if len(of) == 1 else None
    return found


def located(model: Checkpoint) -> object:
    """Return the content of a model's files, with the location of each tensor."""
    if not isinstance(model.tree, dict):
        return model.tree
    return {
        name: model.located(value) if isinstance(value, View) else value
        for name, value in model.tree.items()
    }


def read_json(path: Path) -> Any:
    """Read a JSON file of limited size without duplicate names.

    Raises:
        FormatError: The file is too large, is not valid JSON, or has a duplicate name.
        FileError: The file cannot be opened.
    """
    file = InputFile(path)
    try:
        if file.size > _MOST_JSON_BYTES:
            raise ValueError(f"{file.size} bytes long")
        return json.loads(file.read(0, file.size).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"is not valid JSON ({error})", file=path, remedy="The file is damaged"
        ) from error
    finally:
        file.close()


def trainer_state(folder: Path) -> object:
    """Return the content of the `trainer_state.json` of transformers' Trainer, or None."""
    path = folder / TRAINER_STATE
    return read_json(path) if path.exists() else None


def configuration(path: Path) -> dict[str, Any]:
    """Return the content of a configuration; empty if there is none or it cannot be read."""
    try:
        content = read_json(path) if path.exists() else None
    except SwaAvgError:
        return {}
    return content if isinstance(content, dict) else {}


def is_inside(name: str) -> bool:
    """Return whether a relative path stays inside its folder.

    Symbolic links are not resolved: files in the Hugging Face cache are links.
    """
    parts = PurePosixPath(name).parts
    harmful = {"/", "\\", "..", "\0"}
    return bool(parts) and not any(part in harmful or set(part) & {"\\", "\0"} for part in parts)
