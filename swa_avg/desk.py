"""What one thread works with: its buffers, and what it does with one cell in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from mmap import mmap

import torch

from swa_avg.cutting import Cell, most_elements
from swa_avg.exact import Averager
from swa_avg.gather import Box
from swa_avg.grams import Gram
from swa_avg.plan import Treatment, Work
from swa_avg.reading import Reader
from swa_avg.rounding import NonFiniteError, carrier, cast_into
from swa_avg.tensors import DTYPES, DType

_WIDEST = max(dtype.itemsize for dtype in DTYPES.values())
_KEPT_VIEWS = 64
_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


class _Buffer:
    """Memory that is seen as bytes and as elements; views of it are made once."""

    def __init__(self, size: int) -> None:
        # What is not needed is never touched, nor taken.
        self._bytes = memoryview(mmap(-1, size))
        self._views: dict[tuple[str, int], tuple[memoryview, torch.Tensor]] = {}

    def view(self, dtype: DType, numel: int) -> tuple[memoryview, torch.Tensor]:
        """Return its start as bytes and as elements; complex numbers as two real ones each."""
        key = dtype.name, numel
        if key not in self._views:
            if len(self._views) == _KEPT_VIEWS:
                self._views.clear()
            data = self._bytes[: numel * dtype.itemsize]
            kind = carrier(dtype)
            values = torch.frombuffer(data, dtype=kind) if numel else torch.empty(0, dtype=kind)
            if dtype.name in _PARTS:
                values = values.view(getattr(torch, _PARTS[dtype.name]))
            self._views[key] = data, values
        return self._views[key]


class Desk:
    """The buffers of one thread.

    Args:
        chunk: How many elements of a work a cell has, where its inputs lie in C order.
    """

    def __init__(self, chunk: int) -> None:
        most = most_elements(chunk)
        self._in = _Buffer(most * _WIDEST)
        self._out = _Buffer(most * _WIDEST)
        self._averager = Averager(2 * most)  # complex numbers are two each
        self._rows = torch.empty(0, dtype=torch.float64)

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
            rows = None if gram is None else self._kept(len(readers), out.numel())
            self._averager.mean_into(
                lambda: self._chunks(readers, cell),
                len(readers),
                out,
                _part(work.dtype),
                work.weights,
                rows,
            )
            if gram is not None and rows is not None:
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
        rows = None if gram is None else self._kept(count, out.numel())
        backwards = readers[::-1]
        try:
            for number in self._averager.running_means(
                lambda: self._chunks(backwards, cell),
                count,
                out,
                _part(work.dtype),
                work.weights[::-1],
                rows,
            ):
                yield number, data
        except NonFiniteError as error:
            if error.source is not None:
                error.source = count - 1 - error.source
            raise
        if gram is not None and rows is not None:
            gram.add_chunk(rows, out, backwards=True)

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
        values = self._filled(readers[-1], cell)
        if readers[-1].dtype == work.dtype:
            out.copy_(values)
        else:
            cast_into(values, out, work.dtype)
        same = True
        for reader in readers[:-1]:  # each is read to its end, for its checksum
            same &= torch.equal(self._filled(reader, cell), out)
        return data, same

    def _chunks(self, readers: Sequence[Reader], cell: Cell | Box) -> Iterable[torch.Tensor]:
        return (self._filled(reader, cell) for reader in readers)

    def _filled(self, reader: Reader, cell: Cell | Box) -> torch.Tensor:
        """Read a cell of one input."""
        buffer, values = self._in.view(reader.dtype, cell.numel)
        reader.read(cell, buffer)
        return values

    def _kept(self, count: int, size: int) -> torch.Tensor:
        """Return memory for all inputs of a cell."""
        if self._rows.numel() < count * size:
            self._rows = torch.empty(count * size, dtype=torch.float64)
        return self._rows[: count * size].view(count, size)


def _part(dtype: DType) -> DType:
    """Return the dtype of a complex number's parts, and of others themselves."""
    return DTYPES[_PARTS.get(dtype.name, dtype.name)]
