"""What every rule promises, by itself and as it is stepped by the engine."""

from itertools import pairwise

import pytest
import torch

from comoving.clock import Clock
from comoving.codecs import Int8
from comoving.finders import Power
from comoving.frames import Modes
from comoving.residual import Discard, Feedback
from comoving.rules import Momentum, Shampoo
from comoving.slots import Kind
from comoving.transport import Carry, Keep, Reset, Rotate
from contract.support import COMPLEX, REAL, RULES, STATELESS, Bare, close, is_real, lone, randn, shape_of, step

EVERY = pytest.mark.parametrize("rule", [*RULES, *STATELESS], ids=str)
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(6, 8), (8, 5), (3, 4, 5)], ids=str)
LEVELS = {
    Shampoo(decay=0.9, exponent=0.3, eps=1e-3, every=3, max_size=4, graft=False): None,
    Momentum(): None,
    Momentum(corrected=True): None,
    Momentum(nesterov=True): None,
    Momentum(corrected=True, nesterov=True): None,
}
"""Rules whose directions have no unit size, as they are published."""


@pytest.fixture(autouse=True)
def no_global_randomness():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@EVERY
@DTYPES
@SHAPES
def test_a_direction_has_the_cores_shape_and_dtype_and_z_stays(rule, shape, dtype):
    bare = Bare(rule, shape, dtype)
    names = [slot.name for slot in rule.slots(shape)]
    assert len(set(names)) == len(names)
    for t in range(7):
        z = randn(shape, dtype, t)
        before = z.clone()
        d = bare.take(z)
        assert d.shape == z.shape
        assert d.dtype is dtype
        assert d.isfinite().all()
        assert torch.equal(z, before)
        storages = {x.untyped_storage().data_ptr() for x in (z, *bare.state.values())}
        assert d.untyped_storage().data_ptr() not in storages
        assert bare.state.keys() == set(names)
        for slot in rule.slots(shape):
            x = bare.state[slot.name]
            assert tuple(x.shape) == shape_of(slot, shape)
            if slot.kind is not Kind.SCALAR:
                assert x.dtype is (dtype.to_real() if is_real(slot) and dtype.is_complex else dtype)


@EVERY
@FIELDS
@SHAPES
def test_the_declared_slots_are_used(rule, shape, dtype):
    """Each of them is changed by a few gradients, and steps of one state are equal bit for bit."""
    bare, twin = Bare(rule, shape, dtype), Bare(rule, shape, dtype)
    before = {name: x.clone() for name, x in bare.state.items()}
    for t in range(7):
        z = randn(shape, dtype, t)
        assert torch.equal(bare.take(z), twin.take(z))
    for name, x in before.items():
        assert not torch.equal(bare.state[name], x), name
    momentum = [slot for slot in rule.slots(shape) if slot.name == rule.momentum]
    assert [slot.kind for slot in momentum] == ([] if rule in STATELESS else [Kind.LINEAR])


@EVERY
@DTYPES
def test_zero_gradients_move_nothing(rule, dtype):
    bare = Bare(rule, (6, 8), dtype)
    for _ in range(5):
        assert not bare.take(torch.zeros(6, 8, dtype=dtype)).any()
    assert bare.take(randn((6, 8), dtype)).isfinite().all()
    for _ in range(40):
        assert bare.take(torch.zeros(6, 8, dtype=dtype)).isfinite().all()


@EVERY
@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1), (3, 1, 5), (6,)], ids=str)
def test_modes_of_one_entry(rule, shape, dtype):
    bare = Bare(rule, shape, dtype)
    for t in range(7):
        assert bare.take(randn(shape, dtype, t)).isfinite().all()


@EVERY
@DTYPES
@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e6, 1e15])
def test_gradients_of_rank_one_and_any_size(rule, size, dtype):
    bare = Bare(rule, (6, 8), dtype)
    x, y = randn((6, 1), dtype, 1), randn((1, 8), dtype, 2)
    for t in range(7):
        d = bare.take(x * y * (t + 1) * size)
        assert d.isfinite().all()
        assert d.any()


@EVERY
@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0), (0.5, 0.999)])
def test_any_decay_rates(rule, betas):
    bare = Bare(rule, (6, 8), REAL, betas)
    for t in range(7):
        assert bare.take(randn((6, 8), seed=t)).isfinite().all()


@EVERY
@DTYPES
@SHAPES
def test_directions_are_of_adams_size(rule, shape, dtype):
    if rule in LEVELS:
        pytest.skip("has no unit size, as published")
    bare = Bare(rule, shape, dtype, (0.9, 0.999))
    for t in range(20):
        d = bare.take(randn(shape, dtype, t))
        assert float(d.abs().square().mean().sqrt()) < 5
    assert float(d.abs().square().mean().sqrt()) > 0.05


@EVERY
@FIELDS
@pytest.mark.parametrize("size", [2.0**-12, 2.0**12])
def test_directions_do_not_depend_on_the_size_of_gradients(rule, size, dtype):
    """Up to what eps does: the rules of Adam's scale are free of units. Powers of 2 leave all rounding as it is."""
    if rule in LEVELS:
        pytest.skip("has no unit size, as published")
    small, large = Bare(rule, (6, 8), dtype), Bare(rule, (6, 8), dtype)
    for t in range(9):
        z = randn((6, 8), dtype, t)
        close(large.take(z * size, 1e-30), small.take(z, 1e-30), 1e-3)


@EVERY
@FIELDS
@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_the_recursion_is_that_of_the_momentum(rule, beta1, dtype):
    """m <- a m + b z, exactly; both halves of what error feedback needs."""
    if not rule.linear or rule in STATELESS:
        pytest.skip("its momentum is no average of gradients")
    bare = Bare(rule, (4, 5), dtype, (beta1, 0.99))
    for t in range(5):
        z, m = randn((4, 5), dtype, t), bare.state[rule.momentum].clone()
        decay, intake = rule.recursion(Clock(bare.t, *bare.betas, bare.tick))  # of the coming step
        bare.take(z)
        close(bare.state[rule.momentum], decay * m + intake * z, 1e-12)


# ---------------------------------------------------------------------------------------------------- in the engine

WAYS = {
    "whole": {"rank": 1.0},
    "one side": {"rank": (3, None)},
    "both sides": {"rank": (3, 4)},
    "whole, 8 bits": {"rank": 1.0, "moments": Int8()},
    "one side, 8 bits": {"rank": (3, None), "moments": Int8()},
}
PROJECTED = {"finder": Power(), "residual": Feedback(), "refresh_every": 2, "scale": "match"}
BOTH = pytest.mark.parametrize("way", WAYS)


def start(rule, way, dtype=REAL, shape=(6, 8), **options):
    if "bits" in way and rule.definite:
        pytest.skip("refused: its covariances must not be rounded")
    if rule in STATELESS and "side" in way:
        pytest.skip("refused: it keeps no momentum")
    fitting = {} if rule.corrected else {"transport": Reset()}
    if not rule.linear:
        fitting |= {"residual": Discard(), "finder": Power(inertia=0.0)}
    settings = PROJECTED | fitting | WAYS[way] | options
    if not rule.corrected and "side" in way and settings["transport"].projects:
        pytest.skip("refused: the transport would undo a bias correction that the rule does not make")
    p, optimizer = lone(randn(shape, dtype), rule=rule, lr=0.01, **settings)
    if optimizer.sites[p].plain:
        pytest.skip("torch's AdamW")
    return p, optimizer


@EVERY
@BOTH
@FIELDS
def test_resumes_bitwise(rule, way, dtype):
    """After every number of steps up to seven, so that caches and bases are caught at any age."""
    p, optimizer = start(rule, way, dtype)
    saved = []
    for t in range(8):
        step(optimizer, p, randn((6, 8), dtype, 50 + t))
        saved.append((p.detach().clone(), optimizer.state_dict()))
        saved[-1] = (saved[-1][0], torch_copy(saved[-1][1]))
    for t, ((weights, state), (after, _)) in enumerate(pairwise(saved)):
        q, other = start(rule, way, dtype)
        with torch.no_grad():
            q.copy_(weights)
        other.load_state_dict(state)
        step(other, q, randn((6, 8), dtype, 51 + t))
        assert torch.equal(q, after)


def torch_copy(state):
    """A deep copy, as saving makes one."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: torch_copy(value) for key, value in state.items()}
    return [torch_copy(x) for x in state] if isinstance(state, list) else state


@EVERY
@BOTH
def test_resumes_in_the_middle_of_a_window(rule, way):
    """Between absorb, at a refresh that has dropped caches, and apply."""
    p, optimizer = start(rule, way)
    for t in range(4):
        step(optimizer, p, randn((6, 8), seed=50 + t))
    optimizer.absorb(p, randn((6, 8), seed=60))
    q, other = start(rule, way)
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(torch_copy(optimizer.state_dict()))
    for o, x in ((optimizer, p), (other, q)):
        o.absorb(x, randn((6, 8), seed=61))
        o.apply(x)
        step(o, x, randn((6, 8), seed=62))
    assert torch.equal(p, q)


@EVERY
@BOTH
@pytest.mark.parametrize("transport", [Keep(), Reset(), Rotate(), Carry()], ids=lambda t: type(t).__name__)
def test_the_state_is_what_was_declared(rule, way, transport):
    """Also where the frame has just changed, with every transport; and all stays finite."""
    p, optimizer = start(rule, way, transport=transport)
    shape = (6, 8) if "whole" in way else optimizer.sites[p].core_shape
    for t in range(7):
        step(optimizer, p, randn((6, 8), seed=50 + t) * (t != 2))
        state = optimizer.state[p]
        assert all(x.isfinite().all() for x in (p, *state.values()) if isinstance(x, torch.Tensor))
        if "bits" not in way:
            for slot in rule.slots(shape):
                assert tuple(state[slot.name].shape) == shape_of(slot, shape), slot


@EVERY
@pytest.mark.parametrize("way", ["whole", "one side"])
def test_bfloat16_parameters_have_wide_state(rule, way):
    p, optimizer = start(rule, way, torch.bfloat16)
    for t in range(4):
        step(optimizer, p, randn((6, 8), torch.float32, 50 + t).bfloat16())
    assert p.dtype is torch.bfloat16
    assert p.isfinite().all()
    for slot in rule.slots((6, 8) if way == "whole" else optimizer.sites[p].core_shape):
        assert optimizer.state[p][slot.name].dtype is torch.float32


@EVERY
@BOTH
def test_a_skipped_step_changes_nothing(rule, way):
    p, optimizer = start(rule, way, on_nonfinite="skip")
    for t in range(4):
        step(optimizer, p, randn((6, 8), seed=50 + t))
    q, twin = start(rule, way, on_nonfinite="skip")
    with torch.no_grad():
        q.copy_(p)
    twin.load_state_dict(torch_copy(optimizer.state_dict()))
    weights, before = p.detach().clone(), {n: x for n, x in torch_copy(optimizer.state[p]).items() if n != "tick"}
    step(optimizer, p, torch.full((6, 8), torch.nan, dtype=REAL))
    assert torch.equal(p, weights)
    assert all(torch.equal(optimizer.state[p][name], x) for name, x in before.items() if name != "tick")


@EVERY
def test_a_layout_without_modes_is_refused_where_modes_are_needed(rule):
    class Shapeless(Modes):
        modal = False

    fitting = {} if rule.corrected else {"transport": Reset()}
    if rule in STATELESS:
        with pytest.raises(ValueError, match="keeps no momentum"):
            lone(randn((6, 8)), rule=rule, frame=Shapeless())
    elif any(slot.mode >= 0 for slot in rule.slots((3, 8))):
        with pytest.raises(ValueError, match=r"single modes of the core, while that of frame .*has none"):
            lone(randn((6, 8)), rule=rule, frame=Shapeless())
    else:
        lone(randn((6, 8)), rule=rule, frame=Shapeless(), finder=Power(inertia=0.0), **fitting)


@EVERY
def test_codecs_that_round_are_refused_where_covariances_must_stay_positive(rule):
    if rule.definite:
        with pytest.raises(ValueError, match=r"moments=Int8.*negative eigenvalues"):
            lone(randn((6, 8)), rule=rule, moments=Int8())
    else:
        fitting = {} if rule.corrected else {"transport": Reset()}
        rank = 1.0 if rule in STATELESS else 0.25
        lone(randn((6, 8)), rank=rank, rule=rule, moments=Int8(), finder=Power(inertia=0.0), **fitting)
