"""Headers that files have in common are read once; what is in each file stays its own."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import swa_avg
from swa_avg.checkpoints.layout import Finder
from swa_avg.errors import FormatError, SwaAvgError
from swa_avg.formats import zip_directory
from swa_avg.formats.opening import Headers, open_checkpoint
from swa_avg.formats.zip_directory import Directory, Form
from swa_avg.pickles.budget import Budget
from swa_avg.storage.files import InputFile
from swa_avg.tensors.strided import read_tensor

SAVERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    ".pt": lambda state, path: torch.save(state, path),
    ".safetensors": lambda state, path: save_file(state, path),
}


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tied = torch.randn(3, generator=generator)
    made = {"a": torch.randn(4, 5, generator=generator), "b": tied, "n": torch.tensor(seed)}
    return made | {"c": torch.randn(2, 2, generator=generator).half()}


def in_form(path: Path, headers: Headers, finder: Finder) -> tuple[object, dict[str, Tensor]]:
    checkpoint = open_checkpoint(path, headers)
    try:
        found = finder.find(checkpoint)
        values = {name: read_tensor(ref) for name, ref in found.tensors.items()}
        assert all(ref.record.file in checkpoint.files for ref in found.tensors.values())
        return found.views, values
    finally:
        checkpoint.close()


@pytest.mark.parametrize("suffix", SAVERS)
def test_equal_headers_with_other_data_give_each_file_its_own(suffix: str, tmp_path: Path) -> None:
    """One object speaks of the tensors of all files, and each file's values are its own."""
    headers, finder = Headers(), Finder()
    seen = []
    for seed in range(5):
        path = tmp_path / f"epoch_{seed}{suffix}"
        SAVERS[suffix](state(seed), path)
        views, values = in_form(path, headers, finder)
        assert all(oracle.same_bits(values[name], value) for name, value in state(seed).items())
        seen.append(views)
    assert all(views is seen[0] for views in seen)
    swa_avg.average(sorted(tmp_path.iterdir()), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in "abc":
        wanted = oracle.mean([state(seed)[name] for seed in range(5)])
        assert oracle.same_bits(found[name], wanted)


@pytest.mark.parametrize("suffix", SAVERS)
def test_headers_that_differ_share_nothing(suffix: str, tmp_path: Path) -> None:
    """Of files alike but for the order of names, or a shape, none is taken for the other."""
    headers, finder = Headers(), Finder()
    variants = [state(0), dict(reversed(state(1).items())), state(2) | {"a": torch.ones(5, 4)}]
    for number, variant in enumerate(2 * variants):
        path = tmp_path / f"{number}{suffix}"
        SAVERS[suffix](variant, path)
        _, values = in_form(path, headers, finder)
        assert values.keys() == variant.keys()
        assert all(oracle.same_bits(values[name], variant[name]) for name in variant)


def test_a_view_of_other_headers_is_nowhere(tmp_path: Path) -> None:
    """A storage of the same name in another file's headers leads to no byte of this one."""
    opened = []
    for name in ("one.pt", "two.pt"):
        torch.save(state(0), tmp_path / name)
        opened.append(open_checkpoint(tmp_path / name))
    one, two = opened
    assert isinstance(one.tree, dict)
    one.located(one.tree["a"])
    with pytest.raises(KeyError):
        two.located(one.tree["a"])
    one.close(), two.close()


# Archives of one form.


def described(path: Path, forms: dict[int, Form]) -> Directory | str:
    """Return the directory of an archive, or why it is refused."""
    file = InputFile(path)
    try:
        return zip_directory.read(file, forms, Budget())
    except SwaAvgError as error:
        return str(error)
    finally:
        file.close()


def archive(path: Path) -> bytes:
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2), "c": torch.zeros(1)}, path)
    return path.read_bytes()


def header_bytes(path: Path) -> list[int]:
    """Return the places of all bytes that are no record's."""
    found = described(path, {})
    assert isinstance(found, Directory)
    inside = {
        place
        for entry, start in zip(found.entries, found.starts, strict=True)
        for place in range(start, start + entry.length)
    }
    return [place for place in range(path.stat().st_size) if place not in inside]


def test_a_directory_is_read_alike_whatever_was_read_before(tmp_path: Path) -> None:
    """With a byte changed anywhere in its headers an archive says the same, or is refused alike.

    Padding is told apart by nobody, so that some changes do no harm.
    """
    sound, changed = tmp_path / "in.pt", tmp_path / "in" / "in.pt"
    data = archive(sound)
    changed.parent.mkdir()
    forms: dict[int, Form] = {}
    known = described(sound, forms)
    refused = 0
    for place in header_bytes(sound)[::5]:
        flipped = bytearray(data)
        flipped[place] ^= (0x01, 0x80, 0xFF)[place % 5 % 3]
        changed.write_bytes(flipped)
        alone = described(changed, {})
        assert described(changed, dict(forms)) == alone, place
        refused += isinstance(alone, str)
    assert isinstance(known, Directory)
    assert refused > 60


def test_archives_that_differ_in_folder_and_checksums_are_of_one_form(tmp_path: Path) -> None:
    """Files of a run differ in these; the folder has the name of the file."""
    forms: dict[int, Form] = {}
    known = []
    for number in range(3):
        path = tmp_path / f"epoch_{number}.pt"
        torch.save({"a": torch.full((4,), float(number))}, path)
        found = described(path, forms)
        assert isinstance(found, Directory)
        assert found == described(path, {})
        assert found.root == f"epoch_{number}/"
        with zipfile.ZipFile(path) as theirs:
            assert list(found.checksums) == [entry.CRC for entry in theirs.infolist()]
        known.append(found)
    assert all(found.entries is known[0].entries for found in known)


@pytest.mark.parametrize("line", range(4))
def test_a_folder_that_differs_in_one_line_is_no_folder(line: int, tmp_path: Path) -> None:
    """All lines and local headers name one folder, also where all else is known."""
    sound, changed = tmp_path / "in.pt", tmp_path / "xx.pt"
    data = archive(sound)
    parts = data.replace(b"in/", b"xx/").split(b"xx/")
    changed.write_bytes(b"xx/".join(parts[: line + 1]) + b"in/" + b"xx/".join(parts[line + 1 :]))
    forms: dict[int, Form] = {}
    described(sound, forms)
    for known in ({}, forms):
        found = described(changed, known)
        assert isinstance(found, str) or found.root == ""
    with pytest.raises(FormatError):
        open_checkpoint(changed)


def test_bytes_behind_an_archive_are_refused(tmp_path: Path) -> None:
    """What was appended to a checkpoint is not passed over."""
    path = tmp_path / "in.pt"
    data = archive(path)
    for more in (b"\0", b"junk", bytes(70_000)):
        path.write_bytes(data + more)
        with pytest.raises(
            FormatError, match=r"after its end|end record is missing|split into several"
        ):
            open_checkpoint(path)


NAMES = st.text(
    st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=9
)


@given(
    records=st.dictionaries(NAMES, st.binary(max_size=300), max_size=8),
    comment=st.binary(max_size=40),
    zip64=st.booleans(),
)
def test_random_archives_are_read_as_zipfile_reads_them(
    records: dict[str, bytes], comment: bytes, zip64: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same names, places, lengths and checksums, and the records' own bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.comment = comment if b"PK" not in comment else b""
        for name, data in records.items():
            with packed.open(f"root/{name}", "w", force_zip64=zip64) as file:
                file.write(data)
    path = tmp_path_factory.getbasetemp() / "random.zip"
    path.write_bytes(buffer.getvalue())
    found = described(path, {})
    assert isinstance(found, Directory)
    with zipfile.ZipFile(path) as theirs:
        ours = [
            (found.root + entry.name, entry.header, entry.length, checksum)
            for entry, checksum in zip(found.entries, found.checksums, strict=True)
        ]
        assert ours == [
            (entry.filename, entry.header_offset, entry.file_size, entry.CRC)
            for entry in theirs.infolist()
        ]
    whole = buffer.getvalue()
    for entry, start in zip(found.entries, found.starts, strict=True):
        assert whole[start : start + entry.length] == records[entry.name]


def test_what_is_kept_is_bounded() -> None:
    """The oldest headers are let go beyond 16 MiB, and read again to the same; one always stays."""
    headers, read, budget = Headers(), [], Budget()

    def length(data: bytes, budget: Budget) -> int:
        read.append(data[:1])
        return len(data)

    large = [bytes([number]) * (6 << 20) for number in range(3)]
    for data in (*large, *large[1:]):
        assert headers.once(length, data, budget) == 6 << 20
    assert read == [b"\0", b"\1", b"\2"]
    assert headers.once(length, large[0], budget) == 6 << 20
    assert headers.once(length, bytes(17 << 20), budget) == 17 << 20
    assert headers.once(length, bytes(17 << 20), budget) == 17 << 20
    assert read == [b"\0", b"\1", b"\2", b"\0", b"\0"]
