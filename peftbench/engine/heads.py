"""The packed task head: pooling over a base's output and one small classifier per run.

Kept apart from the adapter, in fp32 whatever the base computes in, and counted apart in every table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of initial weights, as in BERT (Devlin et al. 2019)."""


def pool(hidden: Tensor, mask: Tensor, how: str, pooled: Tensor | None = None) -> Tensor:
    """Reduce hidden states [rows, T, D] to [rows, D] in fp32.

    Args:
        how: "mean" over unmasked tokens, "first" token, "last" unmasked token, or "pooler" (the base's own pooled
        output). pooled: the base's pooled output, for "pooler".
    """
    if how == "pooler":
        assert pooled is not None, "the base was loaded without its pooler"
        return pooled.float()
    if how == "first":
        return hidden[:, 0].float()
    if how == "last":
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = (mask * places).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last].float()
    assert how == "mean", how
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


class PackedHead(nn.Module):
    """Classifier (or regressor, with one output) for R runs: linear, or "mlp" (dense, tanh, linear; RoBERTa's).

    Both apply dropout to their inputs. Initial weights are normal with standard deviation 0.02, biases zero, one
    generator a run.
    """

    def __init__(
        self, kind: str, width: int, outputs: int, generators: Sequence[torch.Generator], dropout: float
    ) -> None:
        super().__init__()
        self.runs = len(generators)
        self.kind = kind
        self.dropout = nn.Dropout(dropout)

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(
                torch.stack([torch.empty(rows, columns).normal_(0, INIT_STD, generator=g) for g in generators])
            )

        if kind == "mlp":
            self.dense = weight(width, width)
            self.dense_bias = nn.Parameter(torch.zeros(self.runs, width))
        self.out = weight(width, outputs)
        self.out_bias = nn.Parameter(torch.zeros(self.runs, outputs))

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled rows [R·B, D] to outputs [R, B, C]."""
        x = self.dropout(pooled.reshape(self.runs, -1, pooled.shape[-1]))
        if self.kind == "mlp":
            x = self.dropout(torch.tanh(torch.baddbmm(self.dense_bias.unsqueeze(1), x, self.dense)))
        return torch.baddbmm(self.out_bias.unsqueeze(1), x, self.out)

    def parameter_count(self) -> int:
        """Return how many parameters one run's head has."""
        return sum(p[0].numel() for p in self.parameters())

    def state_dict_of(self, run: int) -> dict[str, Tensor]:
        """Return one run's tensors without the runs axis, as copies."""
        return {name: p[run].detach().clone() for name, p in self.named_parameters()}
