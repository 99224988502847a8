"""The names that files of weights have in Hugging Face folders.

A name is made of a stem (`diffusion_pytorch_model`), perhaps a variant (`fp16`), and
a suffix. Weights in shards have an index beside them, whose name is made of the same
parts. Only names are looked at here, and nothing is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What libraries look for, the first that is there counts; each may be in shards.
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
# What these stems become where the output is safetensors and the input is not.
_RENAMED = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}
# What stands between dots is a variant only where it is the name of one: a run may have
# checkpoints that it calls `model.epoch_1.bin`.
_VARIANTS = r"\.(?:b?fp?(?:16|32|8)|b?float16|int[48]|nf4|(?:non?_)?ema)"
_WHOLE = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(?P<variant>{_VARIANTS})?\.(?P<suffix>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<suffix>safetensors|bin))?\.index(?P<variant>\.\w+)?\.json"
)


@dataclass(frozen=True)
class Weights:
    """A file of weights, or the index of its shards.

    Attributes:
        path: Where it is.
        stem: The first part of its name.
        variant: The variant with its dot (`.fp16`), or nothing.
        suffix: `safetensors` or `bin`; the name of an index may have neither.
        is_index: Whether it is an index.
    """

    path: Path
    stem: str
    variant: str
    suffix: str
    is_index: bool

    @property
    def is_usual(self) -> bool:
        """Whether libraries look for this name when they are told nothing else."""
        return not self.variant and f"{self.stem}.{self.suffix}" in _NAMES

    @property
    def _stem_written(self) -> str:
        return _RENAMED.get(self.stem, self.stem) if self.suffix == "bin" else self.stem

    def shard_written(self, number: int, count: int) -> str:
        """Return the name of one of `count` safetensors files that hold the same model."""
        part = f"-{number:05}-of-{count:05}" if count > 1 else ""
        return f"{self._stem_written}{self.variant}{part}.safetensors"

    @property
    def index_written(self) -> str:
        """The name of the index of such files."""
        return f"{self._stem_written}.safetensors.index{self.variant}.json"


def candidates(folder: Path) -> Iterator[Weights]:
    """Yield the files or indices that say what a folder's weights are, the best first."""
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
    """Tell whether a name is that of a file of weights, or of an index."""
    return bool(_WHOLE.fullmatch(name) or _INDEX.fullmatch(name))


def _named(path: Path) -> Weights:
    whole, index = _WHOLE.fullmatch(path.name), _INDEX.fullmatch(path.name)
    found = whole or index
    assert found is not None
    return Weights(
        path, found["stem"], found["variant"] or "", found["suffix"] or "", whole is None
    )
