"""FourierFT's half spectrum against the whole one, its entries, and packs of unlike runs."""

from __future__ import annotations

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.fourierft import FourierDelta, FourierFT, entries
from peftbench.models.roles import Site
from tests.conformance.conftest import disturb, fresh


def delta_of(rows: int, columns: int, methods: list[FourierFT]) -> FourierDelta:
    site = Site("linear", "mlp.up", 0, "w", torch.nn.Linear(columns, rows), in_features=columns, out_features=rows)
    return FourierDelta(site, methods, [torch.Generator().manual_seed(i) for i in range(len(methods))])


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (6, 9), (7, 8), (5, 7), (1, 4), (4, 1)])
def test_the_half_spectrum_gives_the_real_part_of_the_whole_transform(rows, columns, share):
    method = FourierFT(frequencies=max(1, int(share * rows * columns)), scale=3.0, entries_seed=5)
    delta = delta_of(rows, columns, [method])
    spectrum = torch.zeros(rows, columns)
    spectrum[entries(rows, columns, method.frequencies, 5)] = delta.c[0].detach()
    want = 3.0 * torch.fft.ifft2(spectrum).real
    change, _ = delta.merged(torch.zeros(rows, columns), None, 0)
    torch.testing.assert_close(change, want)
    x, y = torch.randn(1, 3, columns), torch.randn(1, 3, rows)
    torch.testing.assert_close(delta.after(x, y), y + x @ want.T)


def test_one_coefficient_is_a_cosine():
    delta = delta_of(4, 5, [FourierFT(frequencies=1, scale=20.0, entries_seed=2)])
    (j,), (k,) = (part.tolist() for part in entries(4, 5, 1, 2))
    with torch.no_grad():
        delta.c.fill_(1.0)
    p, q = torch.arange(4.0)[:, None], torch.arange(5.0)
    want = torch.cos(2 * torch.pi * (j * p / 4 + k * q / 5))  # scale over 4 · 5 entries is 1
    torch.testing.assert_close(delta.merged(torch.zeros(4, 5), None, 0)[0], want)


def test_entries_follow_from_their_own_seed_and_are_distinct():
    first, second = peftbench.attach(fresh("tiny-bert"), FourierFT(frequencies=50), runs=2, seeds=[1, 2]).deltas[:2]
    assert torch.equal(first[1].places[0], first[1].places[1])
    assert torch.equal(first[1].places, second[1].places)
    rows, columns = entries(32, 32, 1000, 777)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 1000


def test_unlike_runs_of_a_pack_equal_solos_and_padding_stays_zero():
    methods = [FourierFT(frequencies=3, scale=50.0), FourierFT(frequencies=7, entries_seed=9)]
    together = delta_of(8, 6, methods)
    x, y = torch.randn(2, 5, 6), torch.zeros(2, 5, 8)
    out = together.after(x, y)
    out.square().sum().backward()
    assert not together.c.grad[0, 3:].any()
    assert together.c.grad[0, :3].all()
    for run, method in enumerate(methods):
        alone = delta_of(8, 6, [method])
        alone.load_run_state(together.run_state(run), 0)
        torch.testing.assert_close(alone.after(x[run : run + 1], y[run : run + 1])[0], out[run])


def test_gradients_are_those_of_the_whole_transform():
    adapter = peftbench.attach(fresh("tiny-bert"), FourierFT(frequencies=40))
    disturb(adapter)
    _, delta = adapter.deltas[0]
    x, y = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    delta.after(x, y).square().sum().backward()
    c = delta.c[0].detach().clone().requires_grad_(True)
    spectrum = torch.zeros(32, 32).index_put(entries(32, 32, 40, 777), c)
    (y[0] + x[0] @ (150 * torch.fft.ifft2(spectrum).real).T).square().sum().backward()
    torch.testing.assert_close(delta.c.grad[0], c.grad, rtol=1e-4, atol=1e-5)


def test_more_entries_than_a_matrix_has_are_refused():
    with pytest.raises(UserError, match="frequencies=1025: expected at most 1024"):
        FourierFT(frequencies=1025).check(fresh("tiny-bert"))
