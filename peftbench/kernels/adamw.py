"""AdamW's step over a pack in two kernels: what each run's numbers are now, and the update of all of [R, N].

`engine.optimizer` has the formulas and the same in plain PyTorch, in some twenty kernels, which an eager step of a
small model waits for. Moments are in fp32, or in 8 bits as `kernels.blockwise` says: restored, updated and coded anew
without leaving the program. Last bits differ from plain PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftbench.kernels.backend import constant
from peftbench.kernels.blockwise import DYNAMIC_BLOCK, dynamic_map

SPAN = 1024
"""Elements a program updates."""


@dataclass(frozen=True)
class Fixed:
    """What stays the same from step to step.

    Attributes:
        recipe: every run's 1 − β₁, β₂, 1 − β₂ and ε, [4, R].
        clip: largest norm of its gradient [R], infinite where there is no clipping.
        table: [steps, 5 R], as `engine.optimizer` lays it out; `row` says which line is the step's.
        decay: by element [R, N] or [1, N]; None: there is none.
        ratios: a factor on the rate by element [R, N]; None: 1.
        kept: takes the clipped gradient [R, N]; None: nobody asks.
    """

    recipe: Tensor
    clip: Tensor
    table: Tensor
    row: Tensor
    decay: Tensor | None
    ratios: Tensor | None
    kept: Tensor | None


def step(
    grad: Tensor, norms: Tensor, losses: Tensor, alive: Tensor, flat: Tensor, moments: Sequence[Tensor], fixed: Fixed
) -> None:
    """Update `flat` [R, N] in place with the gradient [R, N], whose runs have the `norms` [R].

    Args:
        losses: [R]; a run with a loss or norm that is not finite is frozen: `alive` [R] (truth values) says so.
        moments: both [R, N] in fp32, or their codes [R, N] in bytes and then their scales [R, N / 256] in fp32.
    """
    from peftbench.kernels import adamw_triton as kernels

    runs, columns = flat.shape
    numbers = torch.empty((4, runs), dtype=torch.float32, device=flat.device)
    nothing = flat
    given = [nothing if t is None else t for t in (fixed.decay, fixed.ratios, fixed.kept)]
    rest = (runs, columns, columns if fixed.decay is not None and len(fixed.decay) > 1 else 0)
    what = {"decays": fixed.decay is not None, "scales": fixed.ratios is not None, "keeps": fixed.kept is not None}
    with torch.cuda.device_of(flat):
        kernels.prepare[(1,)](
            norms, losses, fixed.clip, alive.view(torch.uint8), fixed.table, fixed.row, numbers, runs,
            held=2 ** math.ceil(math.log2(runs)), num_warps=1,
        )  # fmt: skip
        if not columns:
            return
        if len(moments) == 2:
            grid = (-(-columns // SPAN), runs)
            kernels.update[grid](grad, flat, *moments, numbers, fixed.recipe, *given, *rest, **what, block=SPAN)
            return
        blocks = SPAN // DYNAMIC_BLOCK
        maps = [dynamic_map(signed, flat.device) for signed in (True, False)]
        bounds = [boundaries(signed, flat.device) for signed in (True, False)]
        kernels.update_8bit[(-(-columns // SPAN), runs)](
            grad, flat, *moments, *maps, *bounds, numbers, fixed.recipe, *given, *rest, **what, blocks=blocks
        )


@constant
def boundaries(signed: bool, device: torch.device) -> Tensor:
    """Return the 255 numbers that part the dynamic map's codes; what lies on one goes to the code of even index."""
    code = dynamic_map(signed, "cpu")
    bounds = (code[1:] + code[:-1]) / 2
    below = torch.nextafter(bounds, torch.full_like(bounds, -math.inf))
    return torch.where(torch.arange(255) % 2 == 1, below, bounds).to(device)
