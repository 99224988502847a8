"""Damaged and invented files: an error of ours or sound tensors, in bounded memory and time.

Here for some seconds; `fuzz/fuzz_readers.py`, `fuzz/bit_flips.py` and `fuzz/differential.py`
run for as long as one likes, the former guided by coverage where atheris is installed.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from pathlib import Path

import preloaded
import pytest
from fuzz import bit_flips, differential, fuzz_readers
from hypothesis import given, settings
from hypothesis import strategies as st

RUNS = 600
FLIPS = 500
COMPARED = 400


def test_changed_files(tmp_path: Path) -> None:
    """Each reader, fed real files that were changed: within a gibibyte and seconds, no crash."""
    program = fuzz_readers.__file__
    script = (
        "import runpy, warnings; warnings.simplefilter('ignore')\n"
        f"runpy.run_path({program!r}, run_name='__main__')"
    )
    limits = {"RLIMIT_CPU": (240, 240)}
    ended = preloaded.run(
        tmp_path, ("all", f"-runs={RUNS}"), os.environ, 600, script, preloaded.TORCH, limits
    )
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir())
    lines = dict(line.split(": ") for line in ended.stdout.splitlines())
    assert lines.keys() == fuzz_readers.TARGETS.keys()
    for line in lines.values():
        count, accepted = (int(words.split()[0]) for words in line.split(", ")[:2])
        assert count > RUNS
        assert 0 < accepted < count
    print(ended.stdout)


def test_flipped_bits() -> None:
    """Of bits flipped anywhere in real checkpoints, none gives a wrong average."""
    found = bit_flips.flips(FLIPS)
    assert found.keys() == {"refused", "right"}, found  # padding, dates and the like are not read
    assert found.total() == FLIPS
    print(f"{FLIPS} flips: {found['refused']} refused, {found['right']} right")


@pytest.mark.parametrize("name", differential.TARGETS)
def test_torch_is_the_measure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of crafted and changed files each gives what torch or safetensors reads, or is refused."""
    monkeypatch.chdir(tmp_path)  # where files that differ are saved
    found = differential.run(name, COMPARED, seed=1)
    assert found["different"] == 0, sorted(tmp_path.iterdir())
    assert found["equal"] > COMPARED // 20 and found["refused"] > COMPARED // 5
    print(name, dict(found))


def argument(opcode: str) -> st.SearchStrategy[bytes]:
    """Return what may stand behind an opcode: sound numbers and texts, mostly."""
    codes = {info.code: info for info in pickletools.opcodes}
    arg = codes[opcode].arg
    if arg is None:
        return st.just(b"")
    if arg.n > 0:
        return st.one_of(
            st.integers(0, 9).map(lambda n: n.to_bytes(arg.n, "little")),
            st.binary(min_size=arg.n, max_size=arg.n),
        )
    names = ("torch", "OrderedDict", "_rebuild_tensor_v2", "FloatStorage", "storage", "a", "7")
    text = st.sampled_from(names) | st.text(max_size=5)
    if arg.n == -1:
        lines = text.map(lambda t: t.replace("\n", "").encode() + b"\n")
        two = arg.name == "stringnl_noescape_pair"
        return st.tuples(lines, lines).map(b"".join) if two else lines
    size = {-2: 1, -3: 4, -4: 4, -5: 8}[arg.n]
    return text.map(str.encode).map(lambda t: len(t).to_bytes(size, "little") + t)


CODES = [info.code for info in pickletools.opcodes]
OPERATIONS = st.sampled_from(CODES).flatmap(
    lambda code: argument(code).map(lambda tail: code.encode("latin-1") + tail)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(OPERATIONS, max_size=30))
def test_invented_pickles(
    tmp_path_factory: pytest.TempPathFactory, operations: list[bytes]
) -> None:
    """Any sequence of opcodes: alone, and in an archive with storages."""
    data = b"".join(operations) + pickle.STOP
    place = tmp_path_factory.getbasetemp()
    for name in ("pickle", "zipped_pickle"):
        fuzz_readers.TARGETS[name].run(place, data)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.recursive(
            st.none() | st.integers(-1, 2**64) | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["dtype", "shape", "data_offsets"]),
                    st.sampled_from(["F32", "I8", [], [2], [0, 8], [8, 0], [2**62]]) | inner,
                )
            ),
        ),
    ),
    st.binary(max_size=32),
)
def test_invented_headers(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], rest: bytes
) -> None:
    """Any JSON where a safetensors header belongs, and bytes behind it."""
    data = json.dumps(header).encode()
    place = tmp_path_factory.getbasetemp()
    fuzz_readers.TARGETS["safetensors"].run(place, len(data).to_bytes(8, "little") + data + rest)
