"""The components of a Hugging Face folder: the models that it is made of, each with its weights.

Most folders hold one model. A sentence-transformers folder names its modules in
`modules.json`, a diffusers pipeline its models in `model_index.json`; a training
script of diffusers saves a folder for each model (`unet/`, `unet_ema/`), and PEFT one
for each adapter that has a name. Only names and these small files are read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from swa_avg.formats.checkpoint import PROVENANCE
from swa_avg.formats.json_files import is_inside, read_json
from swa_avg.formats.weights import candidates

ROOT = "."  # the component that lies in the folder itself
_MODULES = "modules.json"
_PIPELINE = "model_index.json"
_ROUTER = "router_config.json"
_ADAPTER = "adapter_config.json"
# What only a checkpoint of a run has beside its models, never a folder of checkpoints.
_RUN_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|random_states|rng_state)(_\d+)*\.(bin|pt|pth|pkl|safetensors)"
    rf"|trainer_state\.json|{re.escape(PROVENANCE)}"
)
# How diffusers calls the models of a pipeline, and its training scripts their folders.
_MODELS = re.compile(
    r"(unet|transformer|controlnet|text_encoder|image_encoder|vae|prior|decoder|vqvae|vqgan"
    r"|adapter|t2iadapter|motion_adapter|unconditional|ema)([-_]?(\d|ema|lora|prior|decoder))*"
    r"|(ema)[-_](unet|transformer|controlnet|prior|decoder|model)"
)
# A checkpoint's place in its run: such a folder is no component of the folder around it.
_PLACE_IN_RUN = re.compile(
    r"(?i)\d+|(.*[^a-z])?(best|last|latest|final)"
    r"|(.*[^a-z])?(checkpoint|ckpt|epoch|ep|step|iter|iteration|model)s?[-_=]?\d.*"
)
# Words that say that the weights are averages of those of the run.
_AVERAGES = {"ema", "swa", "avg", "average", "averaged"}


def components(folder: Path) -> tuple[str, ...]:
    """Return the paths, within a folder, of the models that it is made of; ROOT is itself.

    None where the folder is no checkpoint.
    """
    found = [ROOT] if has_weights(folder) else []
    named = list(declared(folder))
    found += [name for name in named if has_weights(folder / name)]
    if not named and (not found or (folder / _ADAPTER).exists()):
        found += _saved_apart(folder, adapters=bool(found))
    return tuple(dict.fromkeys(found))


def has_weights(folder: Path) -> bool:
    """Tell whether there are weights in a folder itself."""
    return next(candidates(folder), None) is not None


def declared(folder: Path) -> Iterator[str]:
    """Yield the paths of sub-folders that the folder's own small files speak of."""
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
    """Yield the paths of the modules between which a router of sentence-transformers chooses."""
    config = folder / path / _ROUTER
    if not config.exists():
        return
    said = read_json(config)
    types = said.get("types") if isinstance(said, dict) else None
    for name in types if isinstance(types, dict) else ():
        if is_inside(name):
            yield name if path == ROOT else f"{path}/{name}"


def _saved_apart(folder: Path, adapters: bool) -> list[str]:
    """Return the sub-folders in which a run has saved its models, each by itself.

    Args:
        folder: The folder around them.
        adapters: Whether only adapters of PEFT are meant: the folder holds one itself.
    """
    entries = sorted(folder.iterdir())
    names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    places = [name for name in names if _PLACE_IN_RUN.fullmatch(name)]
    if places and not adapters:
        return []
    found = [name for name in names if name not in places and has_weights(folder / name)]
    adapted = [name for name in found if (folder / name / _ADAPTER).exists()]
    if adapters or adapted == found:
        return adapted
    known = any(map(_MODELS.fullmatch, found)) or any(averages(found).values())
    return found if known or any(_RUN_STATE.fullmatch(entry.name) for entry in entries) else []


def averages(names: Iterable[str]) -> dict[str, str | None]:
    """Return the components that are averages by their names, with the one that each belongs to.

    An average that belongs to none of the others (to None) is the only one of its kind.
    """
    words = {name: re.split(r"[-_.]", name.lower()) for name in names}
    rest = {name: [word for word in words[name] if word not in _AVERAGES] for name in words}
    raw = [name for name in words if words[name] == rest[name]]
    found: dict[str, str | None] = {}
    for name in words:
        if name not in raw:
            # `ema` alone belongs to the one model beside it.
            of = [one for one in raw if rest[one] == rest[name]] or ([] if rest[name] else raw)
            found[name] = of[0] if len(of) == 1 else None
    return found
