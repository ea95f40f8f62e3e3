"""q-galore follows its reference; the lazy cadence refreshes where and when it should, and resumes bit by bit."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

import comoving
from comoving.cadence import Lazy
from comoving.codecs import Full, Int4, Int8
from comoving.draws import scramble
from comoving.finders import Exact, Power
from comoving.frames import Blocks
from comoving.frames import stored as stored_frame
from comoving.transport import Rotate
from comoving.weights import quantize
from contract.support import randn
from references.galore import GaLore
from references.q_galore import QGaLore

torch.set_num_threads(1)
HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
STEPS, F64 = 60, torch.float64
LAZY = {"threshold": 0.6, "patience": 2, "growth": 3}


def gradients(shape, seed, settles):
    """Noise around a strong direction that stays, or around one that is another at every step."""
    fixed = randn((shape[0], 1), F64, seed) @ randn((1, shape[1]), F64, seed + 1)
    for t in range(STEPS):
        moving = randn((shape[0], 1), F64, seed + 9 * t + 2) @ randn((1, shape[1]), F64, seed + 9 * t + 3)
        yield (fixed if settles else moving) + 0.3 * randn(shape, F64, 500 * seed + t)


class Layers(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.settled, self.moving = (nn.Linear(*shape[::-1], bias=False, dtype=F64) for _ in range(2))
        for i, p in enumerate(self.parameters()):
            p.data = randn(shape, F64, 70 + i)


def ours(optimizer, p, left):
    """The factor as it is read of its codes."""
    frame = stored_frame.load(optimizer.param_groups[0], optimizer.state[p], tuple(p.shape), p.dtype)
    return frame.factors[0 if left else 1]


def run(shape, codec=None, block=256, draw=False, **options):
    """The recipe beside its reference for each of two parameters, one of which settles; the intervals they end with."""
    model, left = Layers(shape), shape[0] <= shape[1]
    if codec is not None:
        quantize(model, codec)
    given = dict(rank=3, refresh_every=4, scale=0.7, cadence=Lazy(**LAZY), moments=Int8(block=block)) | HYPER | options
    optimizer = comoving.build("q-galore", model, **given)
    layers = [model.settled, model.moving]
    phases = [optimizer.sites[layer.weight].phase for layer in layers]
    assert sorted(phases) == [0, 1]
    bits = {}
    references = [
        QGaLore(
            layer.weight.detach() if codec is None else layer.decode(),
            rank=3, every=4, phase=phase, scale=0.7, block=block, weight_block=None if codec is None else codec.block,
            find=lambda g, layer=layer: ours(optimizer, layer.weight, left).clone(),
            draw=(lambda n, layer=layer: bits[layer].pop(0)[:n]) if draw else None, **LAZY, **HYPER,
        )
        for layer, phase in zip(layers, phases, strict=True)
    ]  # fmt: skip
    exact = GaLore(torch.zeros(shape, dtype=F64), 1.0, 3)
    for grads in zip(gradients(shape, 1, True), gradients(shape, 2, False), strict=True):
        for layer, g in zip(layers, grads, strict=True):
            layer.weight.grad = g.clone()
            if draw:
                random = torch.Generator().manual_seed(scramble(int(layer.seed)))
                bits[layer] = list(torch.rand(layer.step.numel(), layer.codes.shape[-1], generator=random))
        optimizer.step()
        for layer, reference, g in zip(layers, references, grads, strict=True):
            t = reference.t
            expected = reference.step(g)
            w = layer.weight.detach() if codec is None else layer.decode()
            torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-9)
            if t in reference.refreshes:
                u, v = ours(optimizer, layer.weight, left), exact.exact(g)
                # 4 bits turn a basis by a few percent; the rest of the run goes by what is read of the codes.
                near = 1e-6 if isinstance(optimizer.param_groups[0]["bases"], Full) else 0.2
                torch.testing.assert_close(u @ u.mT, v @ v.mT, rtol=0, atol=near)
    return references


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["wide", "tall"])
def test_it_is_its_reference_with_moments_in_eight_bits(shape):
    settled, moving = run(shape)
    # 4 steps apart until two cosines are known at steps 0, 4 and 8; then 12, and 36.
    assert settled.phase == 0 and settled.refreshes == [0, 4, 8, 20, 56]
    gaps = {b - a for a, b in zip(moving.refreshes[1:], moving.refreshes[2:], strict=False)}
    assert 4 in gaps and len(moving.refreshes) > len(settled.refreshes)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["wide", "tall"])
def test_with_bases_in_full_the_frames_are_the_papers(shape):
    run(shape, bases=Full())


def test_blocks_shorter_than_a_row():
    run((6, 40), block=16)


@pytest.mark.parametrize("codec", [Int8(), Int8(block=8)], ids=str)
def test_weights_in_eight_bits_to_nearest(codec):
    run((6, 10), codec)


def test_weights_in_eight_bits_rounded_by_the_same_random_bits():
    run((6, 10), Int8(rounding="stochastic"), draw=True)


def test_a_reference_that_rounds_otherwise_is_told_apart():
    """The comparison sees one code: the stochastic run against a reference that rounds to nearest."""
    with pytest.raises(AssertionError, match="not close"):
        run((6, 10), Int8(rounding="stochastic"))


def test_without_patience_spent_it_is_galore_in_few_bits():
    """A threshold that is never reached leaves GaLore's own schedule."""
    model = Layers((6, 9))
    twin = copy.deepcopy(model)
    lazy = comoving.build("galore", model, 1e-2, rank=3, refresh_every=4, cadence=Lazy(threshold=1.0))
    plain = comoving.build("galore", twin, 1e-2, rank=3, refresh_every=4)
    for p, site in zip(twin.parameters(), lazy.sites.values(), strict=True):
        plain.sites[p] = replace(plain.sites[p], phase=site.phase)  # what Lazy times refreshes at steps of its own
    lazy.stacked_entries = plain.stacked_entries = 0  # products of a batch may differ in their last digits
    for grads in zip(gradients((6, 9), 1, True), gradients((6, 9), 2, False), strict=True):
        for m, optimizer in ((model, lazy), (twin, plain)):
            for p, g in zip(m.parameters(), grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_defaults_are_the_papers():
    recipe = comoving.recipes()["q-galore"]
    assert (recipe.options["finder"], recipe.options["cadence"]) == (Exact(), Lazy(0.4, patience=5, growth=2))
    assert recipe.options["moments"] == Int8() and Int8().block == 256
    assert recipe.options["bases"] == Int4(block=256, table="linear")
    assert (recipe.options["refresh_every"], recipe.options["scale"]) == (200, 0.25)
    assert str(recipe.state_formula()) == "0.5156 B mr + 2.031 B nr"


# The cadence in other company


def steps(model, optimizer, which):
    series = [list(gradients(tuple(p.shape), 3 + i, i == 0)) for i, p in enumerate(model.parameters())]
    for t in which:
        for p, own in zip(model.parameters(), series, strict=True):
            p.grad = own[t].to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("cut", [4, 9, 17])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(cut):
    def make():
        model = quantize(Layers((6, 9)).float())
        options = dict(rank=3, refresh_every=4, cadence=Lazy(**LAZY))
        return model, comoving.build("q-galore", model, 1e-2, **options)

    (model, optimizer), (twin, second) = make(), make()
    steps(model, optimizer, range(cut))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    second.load_state_dict(state)
    steps(model, optimizer, range(cut, 30))
    steps(twin, second, range(cut, 30))
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), twin.buffers(), strict=True))
    assert int(optimizer.state[model.settled.weight]["cadence.next"]) == 56


def test_experts_time_their_refreshes_one_by_one():
    p = nn.Parameter(torch.zeros(2, 6, 9))
    options = dict(rank=2, frame=Blocks(), finder=Exact(), cadence=Lazy(**LAZY), refresh_every=4)
    optimizer = comoving.LowRankOptimizer([p], **options)
    for pair in zip(gradients((6, 9), 1, True), gradients((6, 9), 2, False), strict=True):
        p.grad = torch.stack(pair).float()
        optimizer.step()
    lengthened = [int(optimizer.state[p][f"{b}.cadence.lengthened"]) for b in ("0", "1")]
    assert lengthened[0] == 3 and lengthened[1] < 3


def test_the_next_refresh_follows_the_groups_period_when_that_is_edited():
    model = Layers((6, 9))
    optimizer = comoving.LowRankOptimizer(model.parameters(), rank=3, refresh_every=4, cadence=Lazy(threshold=1.0))
    steps(model, optimizer, range(5))
    optimizer.param_groups[0]["refresh_every"] = 10
    steps(model, optimizer, range(5, 10))
    assert int(optimizer.state[model.settled.weight]["cadence.next"]) == 18


def test_a_checkpoint_of_adamw_or_of_another_rank_refreshes_at_once_and_goes_on():
    model = Layers((6, 9))
    torchs = torch.optim.AdamW(model.named_parameters())
    steps(model, torchs, range(3))
    options = dict(refresh_every=4, finder=Power(), cadence=Lazy(**LAZY), transport=Rotate())
    first = comoving.LowRankOptimizer(model.named_parameters(), rank=3, **options)
    first.load_state_dict(torchs.state_dict())
    steps(model, first, range(3, 20))
    second = comoving.LowRankOptimizer(model.named_parameters(), rank=2, **options)
    second.load_state_dict(first.state_dict())
    steps(model, second, range(20, 22))
    state = second.state[model.settled.weight]
    assert int(state["cadence.lengthened"]) >= 1 and tuple(state["frame.0"].shape) == (6, 2)
