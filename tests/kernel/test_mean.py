"""The laws of the kernel beyond the mean itself: checksums, distances, means of the last k."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from folders import save_chunks
from safetensors.torch import load_file, save_file
from torch import Tensor

from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.prepare import planned
from swa_avg.errors import FormatError, NotFiniteError
from swa_avg.kernel import mean, page_cache, tasks
from swa_avg.planning.plan import Treatment
from swa_avg.storage.output import AtomicFile
from swa_avg.tensors.tensor import Record


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def model(seed: int) -> dict[str, Tensor]:
    """Tensors of many kinds: small ones that are averaged together, and one of many chunks."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {f"small.{n}": torch.randn(n % 7 + 1, n % 3 + 1) for n in range(40)}
    state["big"] = torch.randn(90, 101)
    state["half"] = torch.randn(90).to(torch.float16)
    state["halves"] = torch.randn(5).to(torch.float16)
    state["complex"] = torch.randn(30, dtype=torch.complex64)
    state["wide"] = torch.randn(100, dtype=torch.float64) / 3
    state["turned"] = torch.randn(50, 60).t() if seed else torch.randn(60, 50)
    state["view"] = torch.randn(10, 9)[2:7, ::2]
    state["none"] = torch.empty(0, 3)
    state["count"] = torch.tensor([seed])
    state["norm.running_mean"], state["norm.running_var"] = torch.randn(4), torch.ones(4)
    for n in range(100, 140):
        state[f"small.{n}"] = torch.randn(n)
    return state


def saved(folder: Path, states: Sequence[dict[str, Tensor]], suffix: str = ".pt") -> list[Path]:
    paths = [folder / f"epoch_{number}{suffix}" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        if suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in state.items()}, path)
        else:
            torch.save(state, path)
    return paths


@contextmanager
def plan_of(paths: Sequence[Path], out: Path) -> Iterator[tuple[Averaging, AtomicFile]]:
    with planned(paths, out) as averaging, averaging.open_output() as file:
        assert isinstance(file, AtomicFile)
        yield averaging, file


# Checksums.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("chunk", [64, 1000, mean.CHUNK])
def test_every_record_of_an_average_has_its_checksum(
    tmp_path: Path, suffix: str, chunk: int
) -> None:
    """The one that the format records, or one that is found; of a view the whole storage's."""
    paths = saved(tmp_path, [model(seed) for seed in range(3)], suffix)
    with plan_of(paths, tmp_path / "out.pt") as (averaging, file):
        works = averaging.plan.works
        outcome = mean.run(mean.Kernel(file, averaging.layout.places, works, chunk), 2)
    records = {
        record
        for work in works
        if work.treatment is Treatment.AVERAGED
        for source in work.sources
        for record in source.records
    }
    for record in records:
        start = record.file.start + record.offset
        data = record.file.path.read_bytes()[start : start + record.length]
        assert outcome.crcs.get(record, record.crc32) == zlib.crc32(data)
        assert (suffix == ".pt") == (record.crc32 is not None)


@pytest.mark.parametrize("name", ["small.3", "small.120", "big", "turned", "view"])
def test_damage_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    """One bit, in a tensor that is read alone, with others, in boxes, or beside a view."""
    paths = saved(tmp_path, [model(seed) for seed in range(3)])
    with plan_of(paths, tmp_path / "out.pt") as (averaging, _):
        (record,) = (w.sources[1].record for w in averaging.plan.works if w.name == name)
        place = record.offset + record.length // 3
    data = bytearray(paths[1].read_bytes())
    data[place] ^= 1
    paths[1].write_bytes(data)
    with (
        plan_of(paths, tmp_path / "out.pt") as (averaging, file),
        pytest.raises(FormatError, match="is damaged") as refused,
    ):
        mean.run(mean.Kernel(file, averaging.layout.places, averaging.plan.works), 2)
    assert (refused.value.file, refused.value.tensor) == (str(paths[1]), name)


@pytest.mark.parametrize("name", ["small.3", "small.120", "big", "complex", "turned"])
def test_number_that_is_not_finite_is_traced(tmp_path: Path, name: str) -> None:
    """The tensor and the file are named, of small ones that are averaged together too."""
    states = [model(seed) for seed in range(3)]
    states[2][name][-1] = math.nan
    paths = saved(tmp_path, states)
    with plan_of(paths, tmp_path / "out.pt") as (averaging, file):
        kernel = mean.Kernel(file, averaging.layout.places, averaging.plan.works)
        for partials in ((), (file, file)):
            with pytest.raises(NotFiniteError) as refused:
                mean.run(mean.Kernel(file, kernel.places, kernel.works, partials=partials), 1)
            assert refused.value.tensor == name
            assert str(paths[2]) in str(refused.value)


# Distances.


def distances(found: Any) -> list[list[float]]:
    """Return the distance of each input from each other."""
    products = torch.tensor(found.tolist(), dtype=torch.float64)
    square = products.diagonal()
    return (square[:, None] + square[None] - 2 * products).clamp(min=0).sqrt().tolist()


def directly(tensors: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Return the same from differences in float64, which are exact but for float64 inputs."""
    rows = [
        torch.cat([(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t)
                   .to(torch.float64).flatten() for t in ts])
        for ts in tensors
    ]  # fmt: skip
    return [[math.hypot(*(x - y).tolist()) for y in rows] for x in rows]


def groups_of(works: Sequence[Any]) -> list[int]:
    """The small ones, big, and all others; complex and copied ones among them."""
    return [{"small": 0, "big": 1, "half": -1}.get(w.name.partition(".")[0], 2) for w in works]


@pytest.mark.parametrize("chunk", [64, mean.CHUNK])
@pytest.mark.parametrize("near", [1.0, 1e-4])
@pytest.mark.parametrize("swept", [False, True])
def test_inner_products_give_the_distances(
    tmp_path: Path, chunk: int, near: float, swept: bool
) -> None:
    """To a millionth, of checkpoints that are nearly the same too, and by groups."""
    first, changes = model(1), [model(seed) for seed in range(2, 6)]
    states = [first] + [
        {name: (value + near * change[name]).to(value.dtype) for name, value in first.items()}
        for change in changes
    ]
    paths = saved(tmp_path, states)
    with plan_of(paths, tmp_path / "out.pt") as (averaging, file):
        works = averaging.plan.works
        groups = groups_of(works)
        partials = (file,) * 4 if swept else ()
        kernel = mean.Kernel(file, averaging.layout.places, works, chunk, groups, partials)
        outcome = mean.run(kernel, 2)
        places = averaging.layout.places
        written = file.path.read_bytes()
    assert sorted(outcome.grams) == sorted(outcome.squares) == [0, 1, 2]
    for group, products in outcome.grams.items():
        chosen = [n for n, work in enumerate(works)
                  if groups[n] == group and work.treatment is Treatment.AVERAGED]  # fmt: skip
        expected = directly([[state[works[n].name] for n in chosen] for state in states])
        assert products[0].tolist() == [0.0] * 5
        for row, wanted in zip(distances(products), expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-6, abs=1e-12)
        square = 0.0
        for n in chosen:
            dtype = getattr(torch, works[n].dtype.name)
            size = math.prod(works[n].shape) * dtype.itemsize
            data = bytearray(written[places[n] : places[n] + size])
            values = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0)
            square += float(values.to(torch.complex128).abs().square().sum())
        assert outcome.squares[group] == pytest.approx(square, rel=1e-9)


def test_what_is_not_finite_is_no_difference(tmp_path: Path) -> None:
    """NaN and infinities that all inputs have do not spoil the distances of the rest."""
    states = [{"w": torch.randn(500), "v": torch.randn(90000)} for _ in range(3)]
    clean = [{name: value.clone() for name, value in state.items()} for state in states]
    for state, rest in zip(states, clean, strict=True):
        for place, value in ((3, math.nan), (5, math.inf), (7, -math.inf)):
            state["w"][place], rest["w"][place] = value, 0
    with plan_of(saved(tmp_path, states), tmp_path / "out.pt") as (averaging, file):
        kernel = mean.Kernel(file, averaging.layout.places, averaging.plan.works, groups=(0, 0))
        outcome = mean.run(kernel, 1)
    expected = directly([list(state.values()) for state in clean])
    for row, wanted in zip(distances(outcome.grams[0]), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    assert math.isfinite(outcome.squares[0])


# Means of the last k.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("chunk", [64, mean.CHUNK])
def test_partial_means_are_those_of_the_last_k(tmp_path: Path, suffix: str, chunk: int) -> None:
    """The tensors are those of the average of the last k files, bit for bit; the rest the same."""
    states = [model(seed) for seed in range(5)]
    paths = saved(tmp_path, states, suffix)
    out = tmp_path / f"out{suffix}"
    with planned(paths, out) as averaging:
        files = [AtomicFile(tmp_path / f"last{k}{suffix}", averaging.layout.size)
                 for k in range(1, 6)]  # fmt: skip
        kernel = mean.Kernel(
            files[-1], averaging.layout.places, averaging.plan.works, chunk, partials=files[:-1]
        )
        outcome = mean.run(kernel, 2)
        alone = mean.run(mean.Kernel(files[-1], kernel.places, kernel.works, chunk), 2)
        assert (outcome.checksums, outcome.bytes_read) == (alone.checksums, alone.bytes_read)
        said = averaging.plan.state_dict.provenance
        found = [*outcome.partial_checksums, outcome.checksums]
        for file, checksums in zip(files, found, strict=True):
            for place, data in averaging.layout.headers(checksums, said):
                file.write(data, place)
            file.commit()
            file.__exit__()
    for k in range(1, 6):
        path = tmp_path / f"last{k}{suffix}"
        made = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert set(made) == set(states[0])
        for name, value in made.items():
            inputs = [state[name] for state in states[-k:]]
            kept = name == "count" or name.startswith("norm")
            exact = inputs[-1] if kept or not value.numel() else oracle.mean(inputs)
            assert oracle.same_bits(value, exact), (k, name)


def test_record_is_hashable_by_what_it_is() -> None:
    """Two records of one place in one file are one key of `Outcome.crcs`."""
    file: Any = object()
    assert {Record(file, 1, 2): 3}[Record(file, 1, 2)] == 3


# The kernel's page cache.

ROWS = [((0, 0), (100, 60)), ((100, 0), (100, 60))]
COLUMNS = [((0, 0), (200, 18)), ((0, 18), (200, 42))]
GRID = [((row, column), (100, 30)) for row in (0, 100) for column in (0, 30)]


@pytest.mark.parametrize(
    "boxes", [[], ROWS, COLUMNS, GRID], ids=["whole", "rows", "columns", "grid"]
)
@pytest.mark.parametrize("other", [[], ROWS])
def test_advice_covers_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boxes: list[Any], other: list[Any]
) -> None:
    """The ranges of all tasks together are the stored tensors: no byte is missing or foreign."""
    monkeypatch.setattr(tasks, "_LEAST_TASK_BYTES", 1)
    paths = []
    for number, cut in enumerate((boxes, other)):
        state = {"w": torch.randn(200, 60)}
        if cut:
            paths.append(save_chunks(tmp_path / f"step{number}", state, {"w": cut}))
        else:
            torch.save({"model": state}, tmp_path / f"step{number}.pt")
            paths.append(tmp_path / f"step{number}.pt")
    with plan_of(paths, tmp_path / "out.pt") as (averaging, _):
        works = averaging.plan.works
        made = list(tasks.tasks(works, [-1], tasks.Chunking(200, 1 << 20), 8))
        assert len(made) > 1
        wanted: dict[Any, set[int]] = {}
        for record in (record for work in works for ref in work.sources for record in ref.records):
            start = record.file.start + record.offset
            wanted.setdefault(record.file.path, set()).update(range(start, start + record.length))
        advised: dict[Any, set[int]] = {}
        for file, offset, length in (
            one for task in made for one in page_cache._ranges(task, works)
        ):
            places = range(file.start + offset, file.start + offset + length)
            advised.setdefault(file.path, set()).update(places)
        assert advised == wanted


@pytest.mark.parametrize("most", [1, 1 << 40])
def test_large_inputs_leave_the_cache_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """What was not in it is given up after use, what was stays; small inputs are not given up."""
    monkeypatch.setattr(page_cache, "_memory", lambda: most)
    size = 3_000_000
    paths = saved(tmp_path, [{"w": torch.randn(size)} for _ in range(2)])
    with paths[0].open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with plan_of(paths, tmp_path / "out.pt") as (averaging, file):
        (work,) = averaging.plan.works
        cold, warm = work.sources
        middle = cold.record.offset + 2 * size
        if cold.record.file.is_cached(middle) or not warm.record.file.is_cached(middle):
            pytest.skip("this file system's cache cannot be asked, or not be emptied")
        mean.run(mean.Kernel(file, averaging.layout.places, averaging.plan.works), 1)
        assert cold.record.file.is_cached(middle) == (most > 1)
        assert warm.record.file.is_cached(middle)
