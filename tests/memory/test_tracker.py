"""Storages are followed from their creation to their end, as the allocator has it."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from comoving.memory import StorageTracker, measure


def test_live_and_peak_bytes() -> None:
    with StorageTracker() as tracker:
        a = torch.zeros(100)
        assert tracker.live == 400
        b = a + 1
        del a
        assert (tracker.live, tracker.peak) == (400, 800)
        tracker.reset_peak()
        b.mul_(2)  # in place: nothing new
        assert (tracker.live, tracker.peak) == (400, 400)
        del b
    assert tracker.live == 0


def test_views_keep_a_storage_and_count_once() -> None:
    with StorageTracker() as tracker:
        a = torch.zeros(10, 10, dtype=torch.float64)
        row, turned = a[0], a.T
        assert tracker.live == 800
        del a, turned
        assert tracker.live == 800
        del row
    assert tracker.live == 0


def test_what_was_there_counts_when_watched() -> None:
    there = torch.zeros(64)
    tracker = StorageTracker().watch([there, there[:3], there.view(8, 8)])
    assert tracker.live == 256
    with tracker:
        there.view(2, 32)
    assert tracker.live == 256
    del there
    assert tracker.live == 0


def test_an_address_that_is_used_again_counts_again() -> None:
    with StorageTracker() as tracker:
        for size in (10, 20, 30):
            x = torch.zeros(size)
            assert tracker.live == 4 * size
            del x
    assert (tracker.live, tracker.peak) == (0, 120)


def test_devices_can_be_chosen() -> None:
    with StorageTracker("meta") as tracker:
        kept = torch.empty(10), torch.empty(20, device="meta")
    assert tracker.live == 80
    assert len(kept) == 2


def test_tensors_that_grow() -> None:
    with StorageTracker() as tracker:
        x = torch.zeros(10)
        x.resize_(30)
    assert tracker.live == 120


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.linalg.svd(x, full_matrices=False),
        lambda x: torch.linalg.eigh(x @ x.T),
        torch.linalg.qr,
        lambda x: torch.linalg.solve_triangular(torch.linalg.cholesky_ex(x @ x.T).L.mT, x.T, upper=True, left=False),
        lambda x: (x @ x.T).softmax(-1).sum() + x.exp().sqrt().sum(),
    ],
    ids=["svd", "eigh", "qr", "cholesky", "entrywise"],
)
def test_the_peak_is_the_allocators(work) -> None:
    x = torch.randn(256, 384)
    work(x)
    found = measure(lambda: work(x), [x])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work(x)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert found.before == x.nbytes
    assert found.peak - found.before == pytest.approx(peak, rel=0.1)
