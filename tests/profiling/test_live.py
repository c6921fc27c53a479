"""Live tensor bytes against hand counts."""

from __future__ import annotations

import torch

from tokprune.profiling.memory import LiveBytes, live_peak


def test_the_peak_is_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # + 4000; the view is no new storage
        del a  # - 4000
        c = b.t() @ b  # + 40000: the peak is 44000, and 4 for the sum
        total = c.sum()
        del c
        return total + torch.ones(100).sum()

    _, peak = live_peak(work)
    assert peak == 44_004


def test_existing_tensors_count_from_the_start_and_once() -> None:
    layer = torch.nn.Linear(64, 64)
    weights = 4 * (64 * 64 + 64)
    with torch.no_grad():
        _, peak = live_peak(lambda: layer(torch.zeros(2, 64)), [*layer.parameters(), layer.weight])
    assert peak == weights + 2 * (2 * 64 * 4)


def test_bytes_that_die_are_given_back() -> None:
    with LiveBytes() as mode:
        for _ in range(5):
            torch.zeros(1000)
        held = torch.zeros(10)
    assert mode.peak <= 4000 + 40
    assert mode.now == held.numel() * 4


def test_sparse_tensors_count_by_their_parts() -> None:
    def work() -> torch.Tensor:
        return torch.sparse_coo_tensor(torch.zeros(1, 4, dtype=torch.long), torch.ones(4), (8,)).to_dense()

    _, peak = live_peak(work)
    assert peak >= 4 * 8 + 4 * 4 + 8 * 4
