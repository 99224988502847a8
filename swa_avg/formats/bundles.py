"""Checkpoints that bundle weights with other files: folders of frameworks, and `.nemo` archives.

A bundle has files of weights in known places. An output of the same kind is a copy of the
last bundle with other weights, so this module only reads. A `.nemo` file is a tar archive. If
it is not compressed, its weights are a range of bytes of the archive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from swa_avg.errors import FormatError, listed
from swa_avg.formats import single
from swa_avg.formats.checkpoint import (
    MOST_PROVENANCE_BYTES,
    PROVENANCE,
    Checkpoint,
    Components,
    Headers,
    Splice,
)
from swa_avg.formats.components import PLACE_IN_RUN, is_inside, located
from swa_avg.pickles import Budget
from swa_avg.storage import InputFile, Section
from swa_avg.tensors import Record, Tensor

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
        remedy: How to merge the parts; `{run}` and `{name}` are the folder's parent and name.
    """

    name: str
    weights: str
    sign: str = ""
    several: bool = False
    without: tuple[str, ...] = ()
    parts: str = ""
    remedy: str = ""


_KINDS = (
    # deepspeed/runtime/engine.py: _get_ckpt_name, and with ZeRO-3 _get_zero_ckpt_prefix.
    _Kind(
        "DeepSpeed (ZeRO-3)",
        "zero_pp_rank_*_model_states.pt",
        parts="zero_pp_rank_*_model_states.pt",
        remedy="Merge them with DeepSpeed's zero_to_fp32.py, and average what it writes: "
        "python {run}/zero_to_fp32.py {run} merged/{name} -t {name}",
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
    # litgpt/finetune and litgpt/pretrain.py; LoRA and adapters have further suffixes.
    _Kind("LitGPT", "lit_model.pth"),
    _Kind("LitGPT", "lit_model.pth.*"),
)
_LATEST = "latest"  # DeepSpeed's file with the name of the sub-folder to load
_MOST_LATEST_BYTES = 1000
_SPEECHBRAIN = "CKPT.yaml"
_MOST_YAML_BYTES = 1_000_000
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_YAML_LINE = re.compile(r" *(['\"]?)([^\s'\"#-][^:'\"]*)\1:(?:\s+([^#\s].*?))?(?:\s+#.*)?\s*")
_LONGEST_YAML_LINE = 1000
# nemo/core/connectors/save_restore_connector.py: model_weights_ckpt; a folder if distributed.
_NEMO_WEIGHTS = "model_weights.ckpt"
_NEMO_FOLDER = "model_weights/"
_MOST_MEMBERS = 10_000
_MOST_HEADER_BYTES = 1 << 20
_BLOCK = 512
_GZIP = b"\x1f\x8b"


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
            remedy=kind.remedy.format(run=quote(str(home.parent)), name=quote(home.name)),
        )
    if kind.several:
        return replace(_read_models(home, files, headers), format=f"{kind.name} folder")
    whole = single.open_file(files[0], headers)
    return replace(whole, path=folder, format=f"{kind.name} folder", without=kind.without)


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
    # accelerate and Lightning save with DeepSpeed into a sub-folder of their own checkpoint.
    if name and is_inside(name) and not PLACE_IN_RUN.fullmatch(name) and (folder / name).is_dir():
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


# Archives.


def is_archive(path: Path) -> bool:
    """Return whether a file is a `.nemo` archive, or one that is compressed."""
    file = InputFile(path)
    try:
        if file.read(0, min(2, file.size)) == _GZIP:
            return path.suffix == ".nemo"
        return _is_tar(file) and any(map(_is_weights, _members(file)[0]))
    finally:
        file.close()


def open_file(path: Path, headers: Headers, own: bool = False) -> Checkpoint:
    """Open a file of any format, also a `.nemo` archive, and read its headers.

    Args:
        path: The file.
        headers: The cache of headers.
        own: Whether no other process writes to the file, which this process has written.

    Raises:
        FileError: The file cannot be opened.
        FormatError: The file is not a checkpoint, is damaged, or is compressed.
    """
    file = InputFile(path, own)
    try:
        start = file.read(0, min(single.START, file.size))
        if start.startswith(_GZIP) and path.suffix == ".nemo":
            raise FormatError(
                "is a compressed archive, which cannot be read by range",
                file=path,
                remedy=f"Decompress it: gzip -dc {quote(str(path))} > uncompressed.nemo",
            )
        if _has_tar_magic(start):
            return _read_archive(file, headers)
        return single.read(file, headers, Budget(), start)
    except BaseException:
        file.close()
        raise


def _read_archive(file: InputFile, headers: Headers) -> Checkpoint:
    members, _ = _members(file)
    weights = [name for name in members if _is_weights(name)]
    if not weights:
        return single.read(file, headers, Budget())  # refused as a tar archive
    if weights != [_NEMO_WEIGHTS]:
        distributed = any(name.startswith(_NEMO_FOLDER) for name in weights)
        name = file.path.stem
        raise FormatError(
            f"has its weights in several files ({listed(weights)})",
            file=file.path,
            expected=_NEMO_WEIGHTS,
            remedy=f"Unpack each into a folder and average {_NEMO_FOLDER} of these: "
            f"mkdir {quote(name)} && tar -xf {quote(str(file.path))} -C {quote(name)}"
            if distributed
            else "Merge them with NeMo's megatron_change_num_partitions.py",
        )
    inner = single.read(members[_NEMO_WEIGHTS], headers, Budget())
    record, text = inner.provenance_record, inner.provenance
    if PROVENANCE in members:
        section = members[PROVENANCE]
        text = section.read(0, min(section.size, MOST_PROVENANCE_BYTES)).decode("ascii", "replace")
        record = Record(section, 0, section.size)
    return replace(
        inner,
        path=file.path,
        format="NeMo archive",
        files=(file,),
        without=(),
        provenance=text,
        provenance_record=record,
    )


def _is_weights(name: str) -> bool:
    return name.rpartition("/")[2] == _NEMO_WEIGHTS or name.startswith(_NEMO_FOLDER)


def _is_tar(file: InputFile) -> bool:
    return _has_tar_magic(file.read(0, min(single.START, file.size)))


def _has_tar_magic(start: bytes) -> bool:
    return start[257:262] == b"ustar"


class _Headers:
    """The headers of a tar archive, as a file for `tarfile`, which limits what is read at once."""

    def __init__(self, file: InputFile) -> None:
        self._file, self._place = file, 0

    def read(self, length: int) -> bytes:
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        data = self._file.read(self._place, max(0, min(length, self._file.size - self._place)))
        self._place += len(data)
        return data

    def seek(self, place: int) -> None:
        self._place = min(max(place, 0), self._file.size)

    def tell(self) -> int:
        return self._place


def _members(file: InputFile) -> tuple[dict[str, Section], int]:
    """Return the regular files in a tar archive by name, and the place of the archive's end."""
    import tarfile

    found: dict[str, Section] = {}
    try:
        for number, (name, start, size) in enumerate(_entries(file)):
            if name in found or number >= _MOST_MEMBERS:
                what = f"two files with the name {name}" if name in found else "too many files"
                raise FormatError(f"is a tar archive with {what}", file=file.path)
            if size < 0:
                return found, start
            found[name] = Section(file, start, size)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"is a damaged tar archive ({error})",
            file=file.path,
            remedy="Copy it again from its source",
        ) from error
    raise AssertionError("an archive has an end")


def _entries(file: InputFile) -> Iterator[tuple[str, int, int]]:
    """Yield the name, start and size of each regular file; the last size is negative: the end."""
    import tarfile

    archive = tarfile.TarFile(fileobj=_Headers(file), mode="r")  # type: ignore[arg-type]
    for member in archive:
        # Sparse files and links have no range of their own.
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member.name.removeprefix("./"), member.offset_data, member.size
    end = archive.offset
    if end + _BLOCK > file.size or any(file.read(end, _BLOCK)):
        raise tarfile.ReadError("its end is missing")
    yield "", end, -1


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return the change that adds a provenance text to a `.nemo` archive; empty for other files."""
    import tarfile

    if not _is_tar(file):
        return ()
    data = provenance.encode()
    header = tarfile.TarInfo(f"./{PROVENANCE}")
    header.size, header.mode = len(data), 0o644
    block = header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % _BLOCK)
    return (Splice(_members(file)[1], 0, block),)
