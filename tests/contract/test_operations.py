"""How many operations of torch a step is made of: on an accelerator each is a kernel or two, and small ones cost most.

A step between refreshes is counted, by what passes torch's dispatcher, views too: neither times nor decompositions,
which may have to try again, come in. Limits are about 15% above what was counted when they were set. A change that
needs more says so here; one that needs less lowers them.
"""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comoving import build, recipes
from comoving.frames import Blocks

ALIKE, EXPERTS = 24, 16
SMALL, LARGE = (12, 20), (300, 260)
BUDGET = {
    "adamw": (12.1, 27, None),  # torch's own loop over parameters
    "galore": (2.3, 44, 3.9),
    "q-galore": (10.9, 128, 14.4),
    "loqt": (2.6, 46, 4.4),
    "ldadam": (4.9, 105, 7.8),
    "fira": (4.2, 86, 6.8),
    "apollo": (4.9, 73, None),
    "apollo-mini": (4.8, 68, None),
    "frugal": (57, 73, None),
    "tensorgrad": (4.9, 76, 7.0),
    "tensor-galore": (2.3, 44, 3.9),
    "tucker-adam": (5.0, 104, 7.9),
    "nystrom-tucker-adam": (6.2, 129, 9.8),
    "streaming-tucker-adam": (5.8, 115, 9.0),
    "tt-adam": (49, 65, None),
    "tt-ice-adam": (49, 65, None),
    "ht-adam": (49, 65, None),
    "ht-rise-adam": (49, 65, None),
    "foam": (3.0, 59, None),
    "gwt": (4.1, 82, None),
    "snsm": (2.8, 54, 4.5),
    "muon": (4.3, 98, 6.7),
    "normuon": (5.2, 118, 8.0),
    "muonq": (8.2, 420, 13),
    "orthogonal-sgd": (4.1, 94, 6.5),
    "dion": (7.1, 105, None),
    "flora": (7.3, 75, None),
    "online-subspace-descent": (2.3, 44, 3.9),
    "smmf": (4.6, 103, 7.2),
    "lion": (1.2, 22, 2.1),
    "sinkgd": (6.0, 90, 9.3),
    "swan": (7.7, 180, 11.8),
    "scale": (1.6, 31, 2.7),
    "adams": (1.5, 29, 2.6),
    "adafactor": (3.5, 73, 5.6),
    "coap": (2.4, 44, 4.1),
    "dct-adamw": (7.3, 159, None),
    "shampoo": (4.7, 81, 7.3),
    "soap": (6.8, 104, 10.4),
    "low-rank-soap": (7.9, 147, 12.2),
    "shampoo-tucker": (8.4, 161, 12.8),
    "comoving": (8.2, 190, None),
    "comoving-adamw": (10.2, 222, 15.7),
    "sumo": (6.0, 92, 9.4),
    "subtrack": (4.2, 86, 6.8),
    "grasswalk": (4.4, 86, 7.1),
    "grassjump": (5.4, 86, None),
    "lora-pre": (14.3, 202, 21.8),
    "lora-pre-muon": (10.3, 178, 15.7),
}
"""Operations a parameter and step: of 24 alike small matrices, of a large one, which is stepped alone, and of 16
experts in one tensor, a frame each; None where there are no such experts."""
ONE_BY_ONE = {
    "adamw": "torch's own loop",
    "frugal": "moments begin anew at each row's own refresh, so that the rows' step counts differ",
    "flora": "frames are drawn from the seed of each",
    **dict.fromkeys(("tt-adam", "tt-ice-adam", "ht-adam", "ht-rise-adam"), "their frames cannot be stacked"),
}
"""Recipes that have work for each row between refreshes, and why."""
REFRESHED_ONE_BY_ONE = {
    **dict.fromkeys(("apollo", "apollo-mini", "grassjump"), "frames are drawn from the seed of each"),
    "q-galore": "each frame says when it is refreshed again",
    "tensorgrad": "which entries are kept may have to be drawn",
}
"""Those that have some at refreshes only."""
VIEWS = {"aten.view.default", "aten.detach.default"}


class Operations(TorchDispatchMode):
    """Counts the operations that are called inside, and by name those that are more than a view or a number."""

    def __init__(self):
        super().__init__()
        self.every, self.work = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.every += 1
        if str(func) not in VIEWS and any(isinstance(x, torch.Tensor) and x.ndim for x in tree_leaves((args, result))):
            self.work[str(func)] += 1
        return result


def counted(recipe, shapes, every=1000, **options):
    """The operations of a step at which nothing is due, or with a short period of one at which all are refreshed."""
    generator, refreshes = torch.Generator().manual_seed(0), []
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    if not recipes()[recipe].full_rank:
        options["refresh_every"] = every
    optimizer = build(recipe, params, 1e-2, **options)
    optimizer.refresh_scope = lambda: refreshes.append(0) or torch.no_grad()
    phase = max(site.phase for site in optimizer.sites.values())
    operations, last = Operations(), min(every, 2 + phase)
    for t in range(last + 1):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        refreshes.clear()
        with operations if t == last else nullcontext():
            optimizer.step()
    assert len(refreshes) == (every < 1000)
    return operations


@pytest.mark.parametrize("recipe", recipes())
def test_a_small_matrix_among_alike_ones_keeps_to_its_budget(recipe):
    assert counted(recipe, [SMALL] * ALIKE).every <= BUDGET[recipe][0] * ALIKE


@pytest.mark.parametrize("recipe", recipes())
def test_a_large_matrix_keeps_to_its_budget(recipe):
    assert counted(recipe, [LARGE]).every <= BUDGET[recipe][1]


@pytest.mark.parametrize("recipe", [recipe for recipe, (*_, experts) in BUDGET.items() if experts is not None])
def test_an_expert_keeps_to_its_budget(recipe):
    assert counted(recipe, [(EXPERTS, *SMALL)], frame=Blocks()).every <= BUDGET[recipe][2] * EXPERTS


@pytest.mark.parametrize("recipe", [recipe for recipe in recipes() if recipe not in ONE_BY_ONE])
def test_a_batch_of_more_rows_is_no_more_work(recipe):
    """But for views of each row, and numbers that the host reads of it."""
    few, many = (counted(recipe, [SMALL] * rows).work for rows in (4, 12))
    assert few == many


@pytest.mark.parametrize(
    "recipe",
    [name for name in recipes() if not (recipes()[name].full_rank or name in {*ONE_BY_ONE, *REFRESHED_ONE_BY_ONE})],
)
def test_nor_is_its_refresh(recipe):
    """Loosely: a decomposition may have to try again."""
    few, many = (counted(recipe, [SMALL] * rows, every=2).work.total() for rows in (4, 12))
    assert many <= 1.25 * few


def test_every_exception_is_of_something():
    assert recipes().keys() == BUDGET.keys() and ONE_BY_ONE.keys() | REFRESHED_ONE_BY_ONE.keys() <= BUDGET.keys()
