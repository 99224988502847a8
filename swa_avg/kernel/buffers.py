"""The buffers of one worker, and the computation of one cell in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.compensated import Block, Rows, each
from swa_avg.kernel.elements import carrier, fill
from swa_avg.kernel.exact import Averager
from swa_avg.kernel.inner_products import Gram
from swa_avg.kernel.reading import Reader
from swa_avg.kernel.rounding import NonFiniteError, cast_into
from swa_avg.kernel.tasks import Cell
from swa_avg.planning import Treatment, Work
from swa_avg.tensors import Box, DType, real_dtype

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

_KEPT_VIEWS = 64
_ALIGNED = 64


class _Buffer:
    """Memory with views as bytes and as elements; views are cached."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")
        self._views: dict[tuple[str, int, int], tuple[memoryview, Array]] = {}

    def view(self, dtype: DType, numel: int, start: int = 0) -> tuple[memoryview, Array]:
        """Return a part of the memory as bytes and as elements.

        A complex number becomes two real elements.

        Args:
            dtype: The dtype of the elements.
            numel: The number of elements.
            start: The first byte. If the memory has to grow, earlier views are invalid.
        """
        key = dtype.name, numel, start
        if key not in self._views:
            if len(self._views) == _KEPT_VIEWS:
                self._views.clear()
            end = start + numel * dtype.itemsize
            self._grow(end)
            data = self._bytes[start:end]
            values = np.frombuffer(data, carrier(dtype))
            self._views[key] = data, values
        return self._views[key]

    def _grow(self, size: int) -> None:
        if size > len(self._bytes):
            self._views.clear()
            self._bytes = memoryview(mmap(-1, size))


class Buffers:
    """The buffers of one worker; they grow to the size of the largest cell.

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
            work: The averaged work.
            readers: The readers of its inputs.
            cell: The elements.
            gram: Receives the inner products of these elements.

        Raises:
            NonFiniteError: An element is not finite in some input, or becomes so by rounding.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        if cell.numel:
            rows = self._rows(readers, cell)
            self._averager.mean_into(rows, out, real_dtype(work.dtype), work.weights)
            if gram is not None:
                gram.add_chunk(rows, out, real_dtype(work.dtype))
        return data

    def means(
        self, work: Work, readers: Sequence[Reader], cell: Cell | Box, gram: Gram | None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield 1 and the mean of the last input, 2 and the mean of the last two, and so on.

        Arguments and errors are those of `mean`.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        count = len(readers)
        if not cell.numel:
            yield from ((number, data) for number in range(1, count + 1))
            return
        rows = self._rows(readers[::-1], cell)
        means = self._averager.running_means(rows, out, real_dtype(work.dtype), work.weights[::-1])
        try:
            for number in means:
                yield number, data
        except NonFiniteError as error:
            if error.source is not None:
                error.source = count - 1 - error.source
            raise
        if gram is not None:
            gram.add_chunk(_reversed(rows), out, real_dtype(work.dtype))

    def window_means(
        self,
        work: Work,
        readers: Sequence[Reader],
        cell: Cell | Box,
        spans: Sequence[Sequence[int]],
    ) -> Iterator[memoryview]:
        """Yield the bytes of one cell of the mean of each window.

        Args:
            work: The averaged work.
            readers: The readers of its inputs.
            cell: The elements.
            spans: The numbers of the inputs of each window, which are consecutive.

        Raises:
            NonFiniteError: An element is not finite in some input, or becomes so by rounding.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        if not cell.numel:
            yield from (data for _ in spans)
            return
        rows = self._rows(readers, cell)
        for _ in self._averager.window_means(rows, spans, out, real_dtype(work.dtype)):
            yield data

    def without_mean(
        self,
        work: Work,
        readers: Sequence[Reader],
        cell: Cell | Box,
        spans: Sequence[Sequence[int]],
    ) -> Iterator[tuple[memoryview, bool]]:
        """Yield one cell of a work without a mean, and whether all inputs agree.

        Args:
            work: The work.
            readers: The readers of its inputs.
            cell: The elements.
            spans: For each output the numbers of its inputs, of which the last is written.

        Raises:
            NonFiniteError: A finite element becomes infinite by rounding.
        """
        data, out = self._out.view(work.dtype, cell.numel)
        is_reset = work.treatment is Treatment.RESET
        if is_reset and cell.numel:
            fill(out, work.fill, work.dtype)
        if is_reset or not cell.numel:
            yield from ((data, True) for _ in spans)
            return
        rows = [values for values, _ in each(self._rows(readers, cell))]
        for span in spans:
            last = span[-1]
            if readers[last].dtype == work.dtype:
                out[...] = rows[last]
            else:
                cast_into(rows[last], readers[last].dtype, out, work.dtype)
            yield data, all(np.array_equal(rows[row], rows[last]) for row in span[:-1])

    def _rows(self, readers: Sequence[Reader], cell: Cell | Box) -> Rows:
        """Read a cell of all inputs."""
        first, count = readers[0].dtype, len(readers)
        if all(reader.dtype == first for reader in readers):
            data, values = self._in.view(first, count * cell.numel)
            size = len(data) // count
            for number, reader in enumerate(readers):
                reader.read(cell, data[number * size : (number + 1) * size])
            return [Block(values.reshape(count, -1), real_dtype(first))]
        size = -(-cell.numel * max(reader.dtype.itemsize for reader in readers) // _ALIGNED)
        views = [
            self._in.view(readers[number].dtype, cell.numel, number * size * _ALIGNED)
            for number in reversed(range(count))
        ][::-1]
        for reader, (data, _) in zip(readers, views, strict=True):
            reader.read(cell, data)
        return [
            Block(values[None], real_dtype(reader.dtype))
            for reader, (_, values) in zip(readers, views, strict=True)
        ]


def _reversed(rows: Rows) -> Rows:
    return [Block(block.values[::-1], block.dtype) for block in reversed(rows)]
