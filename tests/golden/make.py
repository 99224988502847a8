"""Averages as the kernel made them that computed with torch (commit 925cb35): what must stay.

    python tests/golden/make.py

writes `averages.json` beside it: of each case and tensor the bytes of the mean in base64, of
longer ones the first half of their SHA-256. The inputs are made anew from bit patterns, here
and in the test, so that no generator of random numbers but Python's `getrandbits` has a part
in them.
Run it again only to add cases: what is there was written by other code than ours of today.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracle

import swa_avg

RECORDED = Path(__file__).with_name("averages.json")
_SHORT = 36  # bytes that are written down as they are
_LONG = 9_001  # elements of the tensor that does not go through the kernel in one piece
_COMPLEX = {torch.complex128: torch.float64, torch.complex64: torch.float32}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Case:
    """An average.

    Attributes:
        count: Of how many checkpoints.
        dtype: The dtype of the output.
        bases: How many of them are averaged first, by themselves, to go on from.
        suffix: The form of inputs and output.
        options: Further options.
    """

    count: int
    dtype: str = "keep"
    bases: int = 0
    suffix: str = ".pt"
    options: Mapping[str, object] = field(default_factory=dict)


CASES = {
    **{f"{count} checkpoints": Case(count) for count in (1, 2, 3, 5, 7, 10, 16, 33, 40)},
    **{f"3 as {dtype}": Case(3, dtype) for dtype in ("float32", "bfloat16", "float16")},
    **{f"10 as {dtype}": Case(10, dtype) for dtype in ("float32", "bfloat16", "float16")},
    "2 beside an average of 5": Case(7, bases=5),
    "5 beside an average of 2": Case(7, bases=2),
    "5 beside an average of 3, as bfloat16": Case(8, "bfloat16", bases=3),
    "4 safetensors": Case(4, suffix=".safetensors"),
    "BatchNorm averaged": Case(3, options={"bn_buffers": "mean"}),
    "BatchNorm reset": Case(3, options={"bn_buffers": "reset"}),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pattern_like_a_weight(draw: random.Random, form: oracle.Format, spread: int) -> int:
    """Return the bits of a number of a magnitude of about 2^-spread to 1."""
    lowest = max(0, form.bias - spread)
    exponent = draw.randrange(lowest, form.bias + 1)
    bits = exponent << form.fraction | draw.getrandbits(form.fraction)
    sign = form.sign if draw.getrandbits(1) and bits else 0
    return bits | sign


def finite(draw: random.Random, form: oracle.Format, below: int) -> int:
    """Return the bits of any number of an exponent below the largest but `below`."""
    while True:
        pattern = draw.getrandbits(form.exponent + form.fraction + 1)
        if form.value(pattern) is not None and pattern & (form.sign - 1) < form.largest - (
            below << form.fraction
        ):
            return pattern  # fmt: skip


def floats(dtype: torch.dtype, number: int, case: Case) -> dict[str, Tensor]:
    """Return what is averaged of one dtype by one checkpoint, by what it is good for."""
    form, name = oracle.FORMATS[dtype], name_of(dtype)
    draw, common = random.Random(f"{name} {number}"), random.Random(name)
    narrow = case.dtype != "keep"  # numbers that any dtype can hold
    made: dict[str, list[int]] = {}
    for size in (0, 1, 3, 17, 129):
        made[f"weights{size}"] = [pattern_like_a_weight(draw, form, 8) for _ in range(size)]
    made["spread"] = [pattern_like_a_weight(draw, form, 30) for _ in range(97)]
    made["subnormal"] = [draw.randrange(2 << form.fraction) | draw.choice((0, form.sign))
                         for _ in range(63)]  # fmt: skip
    steps = [common.randrange(1, form.bias << form.fraction) for _ in range(61)]
    made["neighbours"] = [step + draw.getrandbits(1) for step in steps]
    zeros = (0, form.sign)
    made["zeros"] = [draw.choice(zeros) for _ in range(8)] + [form.sign] * 5 + [0] * 3
    if not narrow:
        if dtype is not torch.float64:  # means of it below 1e-307 were not the nearest
            made["anything"] = [finite(draw, form, 8) for _ in range(151)]
        special = [form.largest, form.largest + 1, form.largest + 2, form.sign | form.largest + 1]
        fixed = [pattern for pattern in special if pattern < 2 * form.sign] + [form.sign, 0, 1]
        made["fixed"] = fixed + [pattern_like_a_weight(draw, form, 8) for _ in range(20)]
    if form.unsigned_zero:
        skip = {"fixed"}
        made = {kind: bits if kind in skip else [0 if b == form.sign else b for b in bits]
                for kind, bits in made.items()}  # fmt: skip
    return {f"{name}.{kind}": oracle.from_bits(bits, dtype) for kind, bits in made.items()}


def state(number: int, case: Case) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    made: dict[str, Tensor] = {}
    for dtype in oracle.FORMATS:
        made |= floats(dtype, number, case)
    draw = random.Random(number)
    for dtype, part in _COMPLEX.items():
        form = oracle.FORMATS[part]
        bits = [pattern_like_a_weight(draw, form, 20) for _ in range(2 * 45)]
        pairs = oracle.from_bits(bits, part).reshape(-1, 2)
        made[f"{name_of(dtype)}.weights"] = torch.view_as_complex(pairs)
    half = oracle.FORMATS[torch.float16]
    bits = [pattern_like_a_weight(draw, half, 12) for _ in range(2 * 33)]
    if case.suffix == ".pt":
        made["complex32.weights"] = oracle.from_bits(bits, torch.float16).view(torch.complex32)
    for dtype in (*_INTEGERS, *_UNSIGNED):
        values = torch.tensor([draw.randrange(2) for _ in range(12)]).to(dtype)
        made[f"{name_of(dtype)}.counts"] = values
    single = oracle.FORMATS[torch.float32]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        form, name = oracle.FORMATS[dtype], name_of(dtype)
        bits = [pattern_like_a_weight(draw, form, 10) for _ in range(20 * 31)]
        values = oracle.from_bits(bits, dtype)
        # In some checkpoints the other way round, a part of something larger, or as it is.
        turned = values.reshape(31, 20).t() if number % 3 == 1 else values.reshape(20, 31)
        made[f"{name}.turned"] = turned.clone() if number % 3 == 2 else turned
        if case.suffix == ".pt":
            made[f"{name}.part"] = values.reshape(20, 31)[2:17, 3::4]
            images = values[:600].reshape(5, 6, 5, 4)
            made[f"{name}.images"] = images.to(memory_format=torch.channels_last)
    bits = [pattern_like_a_weight(draw, single, 12) for _ in range(_LONG)]
    made["float32.long"] = oracle.from_bits(bits, torch.float32)
    made["bfloat16.long"] = oracle.from_bits([b >> 16 for b in bits], torch.bfloat16)
    made["float16.long"] = made["float32.long"].to(torch.float16)
    bits = [pattern_like_a_weight(draw, single, 4) & ~single.sign for _ in range(2 * 9)]
    statistics = oracle.from_bits(bits, torch.float32)
    made["norm.running_mean"], made["norm.running_var"] = statistics[:9], statistics[9:]
    made["norm.num_batches_tracked"] = torch.tensor(number)
    if case.suffix == ".safetensors":
        made = {name: value.contiguous() for name, value in made.items()
                if value.dtype is not torch.complex128}  # fmt: skip
    return made


def save(states: Mapping[Path, dict[str, Tensor]]) -> list[Path]:
    from safetensors.torch import save_file

    for path, tensors in states.items():
        (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return list(states)


def averaged(folder: Path, case: Case) -> dict[str, Tensor]:
    """Average a case's checkpoints in a folder, and return what comes of it."""
    from safetensors.torch import load_file

    names = [folder / f"epoch_{number}{case.suffix}" for number in range(case.count)]
    paths = save({path: state(number, case) for number, path in enumerate(names)})
    out = folder / f"out{case.suffix}"
    options = {"dtype": case.dtype, **case.options}
    if case.bases:
        swa_avg.average(paths[: case.bases], folder / "base.pt")
        options["start_from"] = folder / "base.pt"
    swa_avg.average(paths[case.bases :], out, **options)
    found: dict[str, Tensor] = (
        load_file(out) if case.suffix == ".safetensors" else torch.load(out, weights_only=True)
    )
    return found


def described(value: Tensor) -> str:
    """Return a tensor's bytes, in C order of its shape, as text."""
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if len(data) <= _SHORT:
        return base64.b64encode(data).decode()
    return "sha256 " + hashlib.sha256(data).hexdigest()[:32]


def main() -> None:
    made = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = averaged(Path(folder), case)
        made[name] = {tensor: described(value) for tensor, value in found.items()}
    RECORDED.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
