"""The largest rank that fits, against trying every one."""

import pytest
import torch
from torch import nn

from comoving.memory.fit import fit
from comoving.memory.plan import drafted
from comoving.memory.shapes import subject

SETTINGS = dict.fromkeys(("batch", "sequence", "ddp", "fsdp")) | {
    "layerwise": False,
    "checkpointing": False,
    "device": "cpu",
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 64, bias=False), nn.Linear(24, 64, bias=False))


def peaks(recipe: str, options: dict[str, str], ranks: range) -> dict[int, int]:
    known = subject(model())
    return {r: drafted(known, recipe, r, options=options, cache={}, **SETTINGS).peak_bytes for r in ranks}


@pytest.fixture(scope="module")
def known() -> dict[int, int]:
    return peaks("galore", {"moments": "int8", "codec": "int8"}, range(1, 12))


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_rank_is_the_largest_that_fits(share: float, known: dict[int, int]) -> None:
    options = {"moments": "int8", "codec": "int8"}
    limit = round(known[1] + share * (known[11] - known[1]))
    found = fit(subject(model()), "galore", limit, options=options, **SETTINGS)
    assert len(found.candidates) == 1  # the user's codecs are kept
    best = found.best
    assert (best.fits, best.limited) == (True, True)
    assert best.plan.rank == max(r for r, peak in known.items() if peak <= limit)
    assert best.plan.peak_bytes == known[best.plan.rank]
    assert f"rank {best.plan.rank} with moments=int8, codec=int8" in found.verdict
    assert "what binds is" in found.verdict


def test_codecs_are_tried_from_the_least_loss() -> None:
    limit = peaks("galore", {}, range(6, 7))[6]
    found = fit(subject(model()), "galore", limit, options={}, **SETTINGS)
    assert [c.codecs for c in found.candidates] == ["the recipe's own", "8 bits", "4 bits"]
    assert found.candidates[0].plan.rank == 6
    assert all(c.plan.peak_bytes <= limit for c in found.candidates)
    assert found.best.plan.rank == max(c.plan.rank for c in found.candidates)


def test_nothing_fits_and_by_how_much() -> None:
    found = fit(subject(model()), "galore", 10_000, options={"moments": "full"}, **SETTINGS)
    assert not found.best.fits
    assert found.best.plan.rank == 1
    missing = found.best.plan.peak_bytes - 10_000
    assert "nothing fits into 10.00 KB: rank 1 with moments=full needs" in found.verdict
    assert f"{missing / 1000:.2f} KB too much; most of it is temporaries" in found.verdict


def test_everything_fits() -> None:
    found = fit(subject(model()), "galore", 10**9, options={"moments": "full"}, **SETTINGS)
    assert (found.best.fits, found.best.limited) == (True, False)
    assert "every rank fits" in found.verdict


def test_recipes_of_full_rank_have_codecs_alone() -> None:
    found = fit(subject(model(), torch.bfloat16), "muon", 10**9, options={}, **SETTINGS)
    assert [c.plan.rank for c in found.candidates] == [None] * 3
    sizes = [c.plan.state_bytes for c in found.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert found.best.codecs == "the recipe's own"
    with pytest.raises(ValueError, match="unknown recipe"):
        fit(subject(model()), "muom", 10**9, options={}, **SETTINGS)
