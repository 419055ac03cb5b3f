"""Where AdamW's two moments are kept between steps: fp32 or blockwise 8 bits, on the device or paged.

In 8 bits a moment costs a byte a parameter and a scale a block of 256; it is restored, updated in fp32 and stored again
in every step. Source: Dettmers et al. 2022, arXiv:2110.02861, section 2: the first moment has the dynamic map with a
sign, the second the one without, and an update sees the moment before it is rounded.

Deviation: the authors' library keeps tensors of fewer than 4096 elements in fp32. Here everything is in 8 bits: what a
pack trains is one flat vector per run, and which tensor an element belongs to decides nothing, so that two neighbouring
tensors may share a block. Rows are whole blocks: no run shares a scale with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peftbench.engine import paging
from peftbench.kernels import blockwise

BLOCK = blockwise.DYNAMIC_BLOCK
CHUNK = 2**22
"""Elements restored at a time, a multiple of the block: bounds the fp32 copies."""
WHOLE = 2**24
"""Elements (64 MiB in fp32) from which fp32 moments are updated by chunks too; below, one chunk means fewer kernels."""

Zeros = Callable[[Sequence[int], torch.dtype, torch.device], Tensor]


class Moments(Protocol):
    """First and second moment of a matrix of parameters [R, N]."""

    def chunks(self) -> Iterator[slice]:
        """Return slices of columns that cover all of them, at least one, each small enough to be opened."""

    def read(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Return both moments of some columns in fp32; not to be changed."""

    def opened(self, columns: slice) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """Give both moments of some columns, in fp32, to be changed in place."""

    def around(self, start: int, stop: int) -> slice:
        """Return the smallest slice that can be opened and holds columns `start` to `stop`."""

    def tensors(self) -> list[Tensor]:
        """Return what is kept between steps."""

    def rows(self, run: int) -> list[Tensor]:
        """Return views of what is kept of one row of parameters."""


class Dense:
    """Both moments [R, N] in fp32."""

    def __init__(self, rows: int, columns: int, zeros: Zeros, device: torch.device) -> None:
        self.mean, self.square = (zeros((rows, columns), torch.float32, device) for _ in range(2))

    def chunks(self) -> Iterator[slice]:
        rows, columns = self.mean.shape
        width = columns if rows * columns < WHOLE else max(CHUNK // rows, 1)
        yield from _slices(columns, width)

    def read(self, columns: slice) -> tuple[Tensor, Tensor]:
        return self.mean[:, columns], self.square[:, columns]

    @contextmanager
    def opened(self, columns: slice) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.read(columns)

    def around(self, start: int, stop: int) -> slice:
        return slice(start, stop)

    def tensors(self) -> list[Tensor]:
        return [self.mean, self.square]

    def rows(self, run: int) -> list[Tensor]:
        return [self.mean[run], self.square[run]]


class Blockwise:
    """Both moments [R, N] in 8 bits, N being whole blocks; codes [R, N] and scales [R, N / 256] start as zeros."""

    def __init__(self, rows: int, columns: int, zeros: Zeros, device: torch.device) -> None:
        assert columns % BLOCK == 0, columns
        self._maps = [blockwise.dynamic_map(signed, device) for signed in (True, False)]
        self._codes = [zeros((rows, columns), torch.uint8, device) for _ in range(2)]
        # scales are small and read as a whole: they stay on the device
        self._scales = [torch.zeros((rows, columns // BLOCK), device=device) for _ in range(2)]

    def chunks(self) -> Iterator[slice]:
        rows, columns = self._codes[0].shape
        width = max(CHUNK // rows // BLOCK, 1) * BLOCK
        yield from _slices(columns, width)

    def read(self, columns: slice) -> tuple[Tensor, Tensor]:
        mean, square = (self._restored(i, columns) for i in range(2))
        return mean, square

    def _restored(self, i: int, columns: slice) -> Tensor:
        codes = self._codes[i][:, columns].contiguous()
        scales = self._scales[i][:, self._blocks(columns)].reshape(-1)
        return blockwise.dequantize_8bit(codes, scales, self._maps[i])

    @staticmethod
    def _blocks(columns: slice) -> slice:
        assert columns.start % BLOCK == columns.stop % BLOCK == 0, columns
        return slice(columns.start // BLOCK, columns.stop // BLOCK)

    @contextmanager
    def opened(self, columns: slice) -> Iterator[tuple[Tensor, Tensor]]:
        moments = self.read(columns)
        yield moments
        for i, moment in enumerate(moments):
            codes, scales = blockwise.quantize_8bit(moment, self._maps[i])
            self._codes[i][:, columns] = codes
            self._scales[i][:, self._blocks(columns)] = scales.view(len(codes), -1)

    def around(self, start: int, stop: int) -> slice:
        return slice(start // BLOCK * BLOCK, whole_blocks(stop))

    def tensors(self) -> list[Tensor]:
        return [*self._codes, *self._scales]

    def rows(self, run: int) -> list[Tensor]:
        return [t[run] for t in self.tensors()]


def _slices(columns: int, width: int) -> Iterator[slice]:
    """Return slices of `width` columns, the last one narrower; an empty one where there are no columns."""
    for start in range(0, max(columns, 1), max(width, 1)):
        yield slice(start, min(start + width, columns))


def whole_blocks(count: int) -> int:
    """Return `count` rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


@dataclass(frozen=True)
class Storage:
    """How moments are kept."""

    eight_bits: bool = False
    paged: bool = False

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Return what one of `peftbench.config.OPTIMIZERS` names: [paged_]adamw[8bit]."""
        assert text.removeprefix("paged_").removesuffix("8bit") == "adamw", text
        return cls(text.endswith("8bit"), text.startswith("paged_"))

    def width(self, columns: int) -> int:
        """Return how many columns are kept for `columns` parameters."""
        return whole_blocks(columns) if self.eight_bits else columns

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of zeros, paged if asked for; UserError where it cannot be."""
        if self.paged:
            return paging.zeros(shape, dtype, device)
        return torch.zeros(tuple(shape), dtype=dtype, device=device)

    def moments(self, rows: int, columns: int, device: torch.device) -> Moments:
        """Return moments [rows, columns] of zero; `columns` as from `width`."""
        return (Blockwise if self.eight_bits else Dense)(rows, columns, self.zeros, device)
