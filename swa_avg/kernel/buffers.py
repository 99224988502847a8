"""What one worker works with: its buffers, and what it does with one cell in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import mmap

import torch

from swa_avg.kernel.exact import Averager, Rows
from swa_avg.kernel.inner_products import Gram
from swa_avg.kernel.reading import Reader
from swa_avg.kernel.rounding import NonFiniteError, carrier, cast_into
from swa_avg.kernel.tasks import Cell
from swa_avg.planning import Treatment, Work
from swa_avg.tensors import DTYPES, Box, DType

_KEPT_VIEWS = 64
_ALIGNED = 64
_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


class _Buffer:
    """Memory that is seen as bytes and as elements; views of it are made once."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")
        self._views: dict[tuple[str, int, int], tuple[memoryview, torch.Tensor]] = {}

    def view(self, dtype: DType, numel: int, start: int = 0) -> tuple[memoryview, torch.Tensor]:
        """Return a part of it as bytes and as elements; complex numbers as two real ones each.

        Args:
            dtype: Of the elements.
            numel: How many they are.
            start: The byte where they begin. What is larger than any before begins at 0.
        """
        key = dtype.name, numel, start
        if key not in self._views:
            if len(self._views) == _KEPT_VIEWS:
                self._views.clear()
            end = start + numel * dtype.itemsize
            self._grow(end)
            data = self._bytes[start:end]
            kind = carrier(dtype)
            values = torch.frombuffer(data, dtype=kind) if numel else torch.empty(0, dtype=kind)
            if dtype.name in _PARTS:
                values = values.view(getattr(torch, _PARTS[dtype.name]))
            self._views[key] = data, values
        return self._views[key]

    def _grow(self, size: int) -> None:
        if size > len(self._bytes):
            self._views.clear()
            self._bytes = memoryview(mmap(-1, size))


class Desk:
    """The buffers of one worker; they are as large as the largest cell so far needs.

    Args:
        at_once: How many numbers of all inputs are in float64 at once.
    """

    def __init__(self, at_once: int) -> None:
        self._in = _Buffer()
        self._out = _Buffer()
        self._averager = Averager(at_once)

    def mean(
        self, work: Work, readers: Sequence[Reader], cell: Cell | Box, gram: Gram | None
    ) -> memoryview:
        """Return the bytes of one cell of an average.

        Args:
            work: What is averaged.
            readers: Its inputs.
            cell: Which elements.
            gram: Takes up the inner products of these elements.

        Raises:
            NonFiniteError: An element is not finite in some input, or becomes so by rounding.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        if cell.numel:
            rows = self._rows(readers, cell)
            self._averager.mean_into(rows, out, _part(work.dtype), work.weights)
            if gram is not None:
                gram.add_chunk(rows, out)
        return data

    def means(
        self, work: Work, readers: Sequence[Reader], cell: Cell | Box, gram: Gram | None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield 1 and the mean of the last input, 2 and that of the last two, and so on.

        Arguments and errors are those of `mean`.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        count = len(readers)
        if not cell.numel:
            yield from ((number, data) for number in range(1, count + 1))
            return
        rows = self._rows(readers[::-1], cell)
        means = self._averager.running_means(rows, out, _part(work.dtype), work.weights[::-1])
        try:
            for number in means:
                yield number, data
        except NonFiniteError as error:
            if error.source is not None:
                error.source = count - 1 - error.source
            raise
        if gram is not None:
            gram.add_chunk([*rows][::-1], out)

    def without_mean(
        self, work: Work, readers: Sequence[Reader], cell: Cell | Box
    ) -> tuple[memoryview, bool]:
        """Return the bytes of one cell of what is not averaged, and whether all inputs agree.

        Raises:
            NonFiniteError: A finite element becomes infinite by rounding.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        if not cell.numel:
            return data, True
        if work.treatment is Treatment.RESET:
            out.fill_(work.fill)
            return data, True
        rows = self._rows(readers, cell)
        if readers[-1].dtype == work.dtype:
            out.copy_(rows[-1])
        else:
            cast_into(rows[-1], out, work.dtype)
        return data, all(torch.equal(row, out) for row in rows[:-1])

    def _rows(self, readers: Sequence[Reader], cell: Cell | Box) -> Rows:
        """Read a cell of all inputs."""
        first, count = readers[0].dtype, len(readers)
        if all(reader.dtype == first for reader in readers):
            data, values = self._in.view(first, count * cell.numel)
            size = len(data) // count
            for number, reader in enumerate(readers):
                reader.read(cell, data[number * size : (number + 1) * size])
            return values.view(count, -1)
        size = -(-cell.numel * max(reader.dtype.itemsize for reader in readers) // _ALIGNED)
        views = [
            self._in.view(readers[number].dtype, cell.numel, number * size * _ALIGNED)
            for number in reversed(range(count))
        ][::-1]
        for reader, (data, _) in zip(readers, views, strict=True):
            reader.read(cell, data)
        return [values for _, values in views]


def _part(dtype: DType) -> DType:
    """Return the dtype of a complex number's parts, and of others themselves."""
    return DTYPES[_PARTS.get(dtype.name, dtype.name)]
