"""Every recipe on gradients as they really are: nothing raises, weights and state stay finite, no step is too long."""

from itertools import combinations
from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional

import comoving
from comoving.frames import Blocks
from comoving.fuzz import STRUCTURES, Case, Parameter, examine, largest
from comoving.recipes import recipes

EVERY = pytest.mark.parametrize("name", recipes())
SHAPES = {(24, 16): torch.float32, (9, 40): torch.float32, (10, 3, 9): torch.complex64}
STEPS = 12


def embed(structure, shape):
    """One parameter a structure and shape, named so that a failure tells which."""
    return Parameter(f"{structure}-{len(shape)}-{shape[0]}", shape, SHAPES[shape], structure=structure)


def embedded(name, full):
    """All structures in all shapes; or each in one, another one with the next recipe: all pairs of the three."""
    shift, shapes = list(recipes()).index(name), list(SHAPES)
    for i, structure in enumerate(STRUCTURES):
        for shape in shapes if full else [shapes[(i + shift) % len(shapes)]]:
            yield embed(structure, shape)


def test_all_pairs_of_recipe_structure_and_shape_meet():
    met = {(name, p.structure, p.shape) for name in recipes() for p in embedded(name, False)}
    for a, b in combinations(range(3), 2):
        assert len({(x[a], x[b]) for x in met}) == prod(len({x[n] for x in met}) for n in (a, b))


@EVERY
def test_structured_gradients_keep_every_promise(name, request):
    """The fuzz tool's own checks, a resume in the middle among them, on every structure at once."""
    parameters = tuple(embedded(name, request.config.getoption("full")))
    case = Case(0, 0, name, {"refresh_every": 3} if name not in FULL else {}, parameters, None, 1e-2, STEPS, resume=6)
    outcome = examine(case)
    assert outcome.kind == "passed", f"{outcome.detail}\n{outcome.trace}"


FULL = {name for name, recipe in recipes().items() if recipe.full_rank}


class Network(nn.Module):
    """128 features, the values of 64 actions; the loss sees the one that was taken."""

    def __init__(self):
        super().__init__()
        self.values = nn.Linear(128, 64)

    def loss(self, generator):
        states, taken = torch.randn(8, 128, generator=generator).relu(), torch.randint(64, (8, 1), generator=generator)
        return (self.values(states).gather(1, taken) - torch.randn(8, 1, generator=generator)).square().mean()


class Words(nn.Module):
    """400 words, 64 hidden units, 3 classes."""

    def __init__(self):
        super().__init__()
        self.hidden, self.classes = nn.Linear(400, 64), nn.Linear(64, 3)

    def loss(self, generator):
        words = torch.randint(400, (6, 5), generator=generator)
        counts = torch.zeros(6, 400).scatter_add_(1, words, torch.ones(6, 5))
        return functional.cross_entropy(self.classes(self.hidden(counts).relu()), words[:, 0] % 3)


class Experts(nn.Module):
    """Six experts of (16, 20), of which each token goes to one of two."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(6, 16, 20) * 0.1)

    def loss(self, generator):
        tokens = torch.randn(9, 20, generator=generator)
        gate = torch.randint(6, (2,), generator=generator)[torch.randint(2, (9,), generator=generator)]
        return torch.einsum("bij,bj->bi", self.stack[gate], tokens).tanh().square().mean()


def train(name, model, **options):
    """The losses of twelve steps, each within its bound."""
    rate = 1e-3 * recipes()[name].relative_rate
    optimizer = comoving.build(name, model, rate, **options)
    source, losses = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(source)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        losses.append(loss.item())
        for (path, p), old in zip(model.named_parameters(), before, strict=True):
            assert p.isfinite().all(), f"step {step}: {path}"
            share, what = largest(optimizer, p, old, step + 1)
            assert share <= 1.005, f"step {step}: {path} by {what}"
    return losses


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@EVERY
def test_a_q_network_trains(name):
    assert max(train(name, Network())) < 20


@EVERY
def test_a_bag_of_words_trains(name):
    losses = train(name, Words())
    assert max(losses) < 20


@EVERY
def test_gated_experts_train(name):
    """The loss is below 1, as tanh is."""
    own = recipes()[name].options.get("frame")
    special = {"experts": ["stack"]} if own is None else {"frame": Blocks(inner=own)}
    if name == "comoving":  # which sees experts by their name
        special = {}
    if name == "dion":
        special["view"] = "tensor"
    assert max(train(name, Experts(), **special)) <= 1
