"""1/x as a GPU computes it under fast maths: `rcp.approx.ftz.f32`, off by at most one unit in the last place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024


@triton.jit
def _reciprocal(x_ptr, y_ptr, n, span: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * span + tl.arange(0, span)
    inside = place < n
    x = tl.load(x_ptr + place, mask=inside, other=1.0)
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + place, y, mask=inside)


def reciprocal(x: Tensor) -> Tensor:
    """Return 1/x for a contiguous fp32 tensor on a CUDA device."""
    y = torch.empty_like(x)
    with torch.cuda.device(x.device):
        _reciprocal[(triton.cdiv(x.numel(), SPAN),)](x, y, x.numel(), span=SPAN)
    return y
