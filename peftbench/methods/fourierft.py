"""FourierFT: train a few entries of a weight change's spectrum; the change is their inverse Fourier transform.

    W' = W + alpha · Re(IDFT₂(F)),    F: D_out×D_in, zero but for n coefficients c at fixed random entries

Source: Gao et al. 2024, arXiv:2405.03003, section 3, eq. 2 to 4. All sites of one shape share their entries, which
follow from `entries_seed` (not from the run's seed) and are not saved; c is standard normal at first, so that a fresh
adapter does change the model. The transform carries the factor 1 / (D_out D_in), as in the authors' code.

As 2 n cosines the change would cost 2 n (D_in + D_out) a row, more than the D_in D_out of a matrix unless n < D/4. It
is therefore built as one matrix a run and site, in fp32, anew in forward and backward, and never kept
(`dense_change`). Being real it needs half a spectrum only: every coefficient is put in by halves, at its entry and at
the entry's mirror image, wherever those lie in that half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.kernels.backend import constant
from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, normal, require
from peftbench.methods.dense_change import add_product
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, refuse, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites


@constant
def entries(rows: int, columns: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return row and column of `count` distinct entries of a matrix, as HF PEFT draws them; do not write into them."""
    chosen = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count]
    return chosen // columns, chosen % columns


def _halves(rows: int, columns: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return for 2 · `count` places in the flattened half spectrum [rows, columns // 2 + 1]: index, share of c."""
    row, column = entries(rows, columns, count, seed)
    row, column = torch.cat([row, -row % rows]), torch.cat([column, -column % columns])
    width = columns // 2 + 1
    inside = column < width
    return torch.where(inside, row * width + column, 0), inside * 0.5


class FourierDelta(LinearDelta):
    """x ΔWᵀ beside the frozen product."""

    c: nn.Parameter
    places: Tensor
    shares: Tensor
    scale: Tensor

    def __init__(self, site: Site, methods: Sequence[FourierFT], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        self.size = site.out_features, site.in_features
        self.stack("c", [normal((m.frequencies,), 1.0, g) for m, g in zip(methods, generators, strict=True)])
        most = max(m.frequencies for m in methods)
        places = torch.zeros(self.runs, 2, most, dtype=torch.long)
        shares = torch.zeros(self.runs, 2, most)
        for run, m in enumerate(methods):
            index, share = _halves(*self.size, m.frequencies, m.entries_seed)
            places[run, :, : m.frequencies] = index.reshape(2, -1)
            # Padding keeps a share of 0: it reaches no entry and gets no gradient.
            shares[run, :, : m.frequencies] = share.reshape(2, -1)
        self.register_buffer("places", places.flatten(1), persistent=False)
        self.register_buffer("shares", shares.flatten(1), persistent=False)
        self.constant("scale", [m.scale for m in methods])

    def change(self, c: Tensor, places: Tensor, shares: Tensor, scale: Tensor) -> Tensor:
        """Return ΔW [R, D_out, D_in] for coefficients c [R, n]."""
        rows, columns = self.size
        spectrum = c.new_zeros(len(c), rows * (columns // 2 + 1))
        spectrum = spectrum.scatter_add(1, places, c.repeat(1, 2) * shares)
        return torch.fft.irfft2(spectrum.unflatten(1, (rows, -1)), s=self.size) * scale

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return add_product(self.change, x, y, self.c, self.places, self.shares, self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        one = slice(run, run + 1)
        change = self.change(self.c[one], self.places[one], self.shares[one], self.scale[one])[0]
        return (weight.float() + change).to(weight.dtype), bias


class FourierFormat(SiteFormat):
    """PEFT's FourierFT; both draw the entries from the same seed in the same way."""

    peft_type = "FOURIERFT"
    names = {"c": ("fourierft_spectrum", same, same)}

    def config(self, method: FourierFT, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "n_frequency": method.frequencies,
            "scaling": method.scale,
            "random_loc_seed": method.entries_seed,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, bias="none", n_frequency_pattern={})
        return {
            "frequencies": config["n_frequency"],
            "scale": float(config["scaling"]),
            "entries_seed": config["random_loc_seed"],
            "targets": targets(config),
        }


@dataclass(frozen=True)
class FourierFT(Method):
    """A few trained entries of the weight change's spectrum beside frozen linear maps."""

    frequencies: int = 1000
    """Trained entries a map."""
    scale: float = 150.0
    entries_seed: int = 777
    """Seed of the entries' places, the same for every run that does not set it."""
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=False,
        free_in_pack=frozenset({"frequencies", "scale", "entries_seed"}),
        cost_free=frozenset({"frequencies", "scale", "entries_seed"}),
    )
    card = Card(
        equation="y = W x + b + alpha · Re(IDFT₂(F)) x,  F zero but for n trained entries",
        paper="Gao et al. 2024, arXiv:2405.03003",
        parameters="n a map",
    )
    peft = FourierFormat()

    def __post_init__(self) -> None:
        require(self.frequencies >= 1, "frequencies", self.frequencies, "a whole number of at least 1")
        require(self.scale > 0, "scale", self.scale, "a number above 0")
        require(self.entries_seed >= 0, "entries_seed", self.entries_seed, "a whole number of at least 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        limit = site.in_features * site.out_features
        accepted = f"at most {limit}, the entries of {site.name}"
        require(self.frequencies <= limit, "frequencies", self.frequencies, accepted)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[FourierFT], generators: Sequence[torch.Generator]) -> FourierDelta:
        return FourierDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.frequencies
