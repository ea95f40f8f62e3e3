"""The references agree with independent truths: torch's AdamW, cases worked by hand, identities, and each other."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from references.adamw import AdamW
from references.algebra import basis, every, hosvd, mode_product, power
from references.galore import GaLore
from references.ldadam import LDAdam
from references.tensor_galore import TensorGaLore, tucker
from references.tucker_adam import TuckerAdam

PLAIN = Path(__file__).parents[2] / "benchmarks" / "plain_ldadam.py"
REAL, COMPLEX = torch.float64, torch.complex128
HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TRANSPORTS = ("keep", "reset", "rotate", "carry")


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def series(shape, dtype=REAL, steps=6, seed=0):
    """A start and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(steps + 1)]
    return draws[0], draws[1:]


def run(reference, gradients):
    for g in gradients:
        reference.step(g)
    return reference


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def identity(operand, old_factors):
    return [torch.eye(size, dtype=operand.dtype) for size in operand.shape]


def rephased(find, seed=0):
    """The same frames with random signs or phases on their columns."""
    generator = torch.Generator().manual_seed(seed)

    def changed(operand, old_factors):
        out = []
        for f in find(operand, old_factors):
            if f is None:
                out.append(None)
                continue
            phase = torch.randn(f.shape[1], dtype=f.dtype, generator=generator)
            out.append(f * (phase / phase.abs()))
        return out

    return changed


def test_adamw_is_torch_adamw():
    start, gradients = series((5, 3))
    p = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([p], **HYPER)
    reference = AdamW(start, **HYPER)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        close(reference.step(g), p.detach(), 1e-12)


def test_complex_adamw_is_unchanged_by_a_global_phase():
    start, gradients = series((4, 3), COMPLEX)
    phase = torch.polar(torch.tensor(1.0, dtype=REAL), torch.tensor(0.7, dtype=REAL))
    plain = run(AdamW(start, **HYPER), gradients)
    turned = run(AdamW(start * phase, **HYPER), [g * phase for g in gradients])
    close(turned.p, plain.p * phase)
    assert not plain.v.is_complex()


def test_complex_adamw_with_real_entries_is_the_real_one():
    start, gradients = series((4, 3))
    real = run(AdamW(start, **HYPER), gradients)
    as_complex = run(AdamW(start.to(COMPLEX), **HYPER), [g.to(COMPLEX) for g in gradients])
    close(as_complex.p, real.p.to(COMPLEX))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_basis_is_the_mode_product(dtype):
    factors = [torch.randn(4, 2, dtype=dtype), None, torch.randn(5, 3, dtype=dtype)]
    z = torch.randn(2, 3, 3, dtype=dtype)
    lifted = mode_product(mode_product(z, factors[0], 0), factors[2], 2)
    close((basis(factors, (4, 3, 5), dtype) @ z.flatten()).reshape(4, 3, 5), lifted)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_identity_frame_gives_adamw(shape, dtype):
    start, gradients = series(shape, dtype)
    dense = run(AdamW(start, **HYPER), gradients).p
    eye = torch.eye(min(shape), dtype=dtype)
    close(run(GaLore(start, rank=4, scale=1.0, find=lambda g: eye, refresh_at=every(2), **HYPER), gradients).p, dense)
    close(run(TensorGaLore(start, ranks=shape, find=identity, refresh_at=every(2), **HYPER), gradients).p, dense)
    for transport in ("keep", "rotate", "carry"):
        reference = TuckerAdam(start, find=identity, transport=transport, rho=0.5, **HYPER)
        close(run(reference, gradients).p, dense)
        close(reference.e, torch.zeros_like(start))
    ldadam = LDAdam(start, rank=4, **HYPER)
    ldadam.first_frame = ldadam.power_iteration = lambda x: eye
    close(run(ldadam, gradients).p, dense)


def test_identity_frame_any_order_gives_adamw():
    start, gradients = series((2, 3, 2, 3), COMPLEX)
    dense = run(AdamW(start, **HYPER), gradients).p
    close(run(TuckerAdam(start, find=identity, **HYPER), gradients).p, dense)
    close(run(TensorGaLore(start, ranks=(None,) * 4, n_iter=2, **HYPER), gradients).p, dense)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 4)])
def test_ldadam_is_rotating_tucker_adam_with_one_whole_side(shape, period, feedback, dtype):
    start, gradients = series(shape, dtype, steps=8)
    options = {"rho": 0.7, "period": period, "error_feedback": feedback, **HYPER}
    matrix = LDAdam(start, rank=2, **options)
    ranks = (2, None) if matrix.left else (None, 2)
    tensor = TuckerAdam(start, find=power(ranks), transport="rotate", scale=1.0, **options)
    for g in gradients:
        close(matrix.step(g), tensor.step(g), 1e-8)
    close(matrix.e, tensor.e, 1e-8)


@pytest.mark.parametrize("columns_first", [False, True])
def test_ldadam_by_hand(columns_first):
    """b1 = b2 = rho = 1/2, G_0 = 2 e1 e1^T, G_1 = 2 e2 e1^T: U turns from e1 to (e1+e2)/sqrt 2."""

    def view(x):
        return x.T if columns_first else x

    zero = torch.zeros(2, 2, dtype=REAL)
    g0, g1 = zero.clone(), zero.clone()
    g0[0, 0], g1[1, 0] = 2.0, 2.0
    reference = LDAdam(
        zero, lr=1.0, rank=1, betas=(0.5, 0.5), rho=0.5, eps=1e-14, side="right" if columns_first else "left"
    )
    first = torch.tensor([[-1.0, 0.0], [0.0, 0.0]], dtype=REAL)
    close(view(reference.step(view(g0))), first)
    close(view(reference.e), zero)
    h = 1 / math.sqrt(2)
    close(view(reference.step(view(g1))), first - torch.tensor([[h, 0.0], [h, 0.0]], dtype=REAL))
    close(view(reference.m).abs(), torch.tensor([[1.5 * h, 0.0]], dtype=REAL))
    close(view(reference.v), torch.tensor([[1.5, 0.0]], dtype=REAL))
    close(view(reference.e), torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=REAL))


def test_carry_by_hand():
    """The case above with the mass of v: kappa 1/2 -> 1/4 -> 5/8, K 1/2 -> 3/4, v 2 -> max(1/2, |m'|^2/K) -> 3/2."""
    zero = torch.zeros(2, 2, dtype=REAL)
    g0, g1 = zero.clone(), zero.clone()
    g0[0, 0], g1[1, 0] = 2.0, 2.0
    reference = TuckerAdam(zero, 1.0, power((1, None)), rho=0.5, scale=1.0, betas=(0.5, 0.5), eps=1e-14)
    run(reference, [g0])
    close(reference.kappa, torch.full((1, 2), 0.5, dtype=REAL))
    run(reference, [g1])
    close(reference.kappa, torch.full((1, 2), 0.625, dtype=REAL))
    close(reference.v, torch.tensor([[1.5, 0.0]], dtype=REAL))
    assert reference.K == pytest.approx(0.75)
    h = math.sqrt(1 / 2 * 5 / 6)  # d = sqrt(2 / (12/5)), lifted by 1/sqrt(2)
    close(reference.p, -torch.tensor([[1 + h, 0.0], [h, 0.0]], dtype=REAL))


def test_carry_weighs_by_mass_by_hand():
    """v^ = (3, 1), m^ = (1, 0), kappa = (1/2, 1/4), turned by 45 degrees: s = (2, 1), kappa' = 3/8, v' = 5/8 + 3/16."""
    reference = run(TuckerAdam(torch.zeros(2, 1, dtype=REAL), 1.0, power((2, None))), [torch.ones(2, 1, dtype=REAL)])
    reference.m = torch.tensor([[1 - HYPER["betas"][0]], [0.0]], dtype=REAL)
    reference.v, reference.kappa = torch.tensor([[1.5, 0.5], [0.25, 0.25]], dtype=REAL).split(1, dim=1)
    reference.betas, reference.K = HYPER["betas"], 1e3
    h = 1 / math.sqrt(2)
    m, v, kappa = reference.carried(torch.tensor([[h, h], [-h, h]], dtype=REAL))
    close(m, (1 - HYPER["betas"][0]) * torch.tensor([h, -h], dtype=REAL))
    close(kappa, torch.full((2,), 3 / 8, dtype=REAL))
    close(v, torch.full((2,), 13 / 16, dtype=REAL))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("finder", [hosvd, power])
@pytest.mark.parametrize(("shape", "ranks"), [((5, 4), (2, None)), ((4, 5), (2, 3)), ((4, 3, 3), (2, None, 2))])
def test_feedback_telescopes(shape, ranks, finder, transport, dtype):
    start, gradients = series(shape, dtype, steps=7)
    reference = TuckerAdam(start, find=finder(ranks), transport=transport, rho=0.5, period=2, **HYPER)
    for g in gradients:
        reference.step(g)
        close(reference.telescoping_gap(), torch.zeros_like(start))
    assert reference.e.abs().max() > 0.1


def test_feedback_telescopes_in_ldadam():
    start, gradients = series((4, 6))
    reference, total = LDAdam(start, rank=2, **HYPER), torch.zeros_like(start)
    for g in gradients:
        reference.step(g)
        lifted = reference.lift(reference.u, reference.m)
        total += lifted
    close(total + 0.8 / 0.2 * lifted + reference.e, sum(gradients))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("transport", ["rotate", "carry"])
def test_transports_do_not_see_phases(transport, dtype):
    start, gradients = series((4, 3, 3), dtype, steps=7)
    find = hosvd((2, None, 2))
    plain = run(TuckerAdam(start, find=find, transport=transport, rho=0.5, **HYPER), gradients)
    turned = run(TuckerAdam(start, find=rephased(find), transport=transport, rho=0.5, **HYPER), gradients)
    close(turned.p, plain.p, 1e-8)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("raw_floor", [False, True])
def test_carry_and_adams_bound_when_frames_jump_and_ranks_change(raw_floor, dtype):
    """Growing gradients make |m^|^2 exceed v^, so the variance term is negative and the floor does the work.

    The floor of design.md holds at the refresh, and is lost at a zero gradient after it where kappa' is small, since
    v/kappa then falls by b2 kappa' / (b2 kappa' + 1-b2); the floor |m'|^2/K holds ever after.
    """
    start, gradients = series((5, 4), dtype, steps=16)
    generator = torch.Generator().manual_seed(1)

    def jump(operand, old_factors):
        rank = int(torch.randint(1, 4, (), generator=generator))
        return [torch.linalg.qr(torch.randn(n, rank, dtype=dtype, generator=generator))[0] for n in operand.shape]

    b1, b2 = 0.5, 0.99
    options = {"error_feedback": False, "period": 4, "betas": (b1, b2), "raw_floor": raw_floor}
    reference = TuckerAdam(start, lr=0.01, find=jump, **options)
    carried, at_refresh = reference.carried, []

    def watched(r):
        m, v, kappa = carried(r)
        at_refresh.append((m.abs() ** 2 <= reference.K * (1 - b2**reference.t) * v / kappa * (1 + 1e-12)).all())
        return m, v, kappa

    reference.carried = watched
    ever_after = []
    for t, g in enumerate(gradients):
        reference.step(0.0 * g if t % 4 == 0 and t > 0 else 3.0**t * g)
        bound = reference.K * (1 - b2**reference.t) * reference.v / reference.kappa
        ever_after.append((reference.m.abs() ** 2 <= bound * (1 + 1e-12)).all())
    assert len(at_refresh) == 3
    assert all(at_refresh)
    assert all(ever_after) == raw_floor


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_galore_is_tensor_galore_with_one_whole_side(shape, dtype):
    start, gradients = series(shape, dtype, steps=6)
    matrix = GaLore(start, rank=2, refresh_at=every(3), **HYPER)
    own = matrix.find

    def shared(operand, old_factors):
        frame = own(operand)
        # G Q = G x_2 U^H needs U = conj(Q)
        return [frame, None] if matrix.left else [None, frame.conj()]

    tensor = TensorGaLore(start, ranks=(2, None) if matrix.left else (None, 2), find=shared, scale=0.25, **HYPER)
    tensor.refresh_at = every(3)
    close(run(tensor, gradients).p, run(matrix, gradients).p)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_galore_reproduces_a_low_rank_gradient(dtype):
    """An exactly rank-2 gradient passes through the projector unchanged, which fails without the conjugation."""
    a, b = torch.randn(7, 2, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    g = a @ b
    for x in (g, g.mH):
        reference = GaLore(torch.zeros_like(x), lr=1.0, rank=2)
        frame = reference.find(x)
        close(frame @ (frame.mH @ x) if reference.left else (x @ frame) @ frame.mH, x)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_tensor_galore_is_keeping_tucker_adam_without_feedback(dtype):
    ranks = (2, None, 2)
    start, gradients = series((4, 3, 3), dtype, steps=6)
    for n_iter in (0, 3):
        options = {"refresh_at": every(2), "scale": 0.5, **HYPER}
        find = tucker(ranks, n_iter)
        modes = run(TensorGaLore(start, ranks=ranks, n_iter=n_iter, **options), gradients)
        kron = run(TuckerAdam(start, find=find, transport="keep", error_feedback=False, **options), gradients)
        close(modes.p, kron.p)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_hooi_does_not_lose_to_hosvd_and_finds_exact_tucker_ranks(dtype):
    ranks = (2, 2, 2)
    start, _ = series((5, 4, 4), dtype, steps=1)

    def captured(x, factors):
        for n, f in enumerate(factors):
            x = mode_product(x, f.mH, n)
        return x.norm()

    energies = [captured(start, tucker(ranks, n_iter=n)(start, None)) for n in range(4)]
    assert all(b >= a - 1e-12 for a, b in zip(energies, energies[1:], strict=False))
    exact = torch.randn(ranks, dtype=dtype)
    for n, size in enumerate(start.shape):
        exact = mode_product(exact, torch.randn(size, 2, dtype=dtype), n)
    close(captured(exact, tucker(ranks, n_iter=1)(exact, None)), exact.norm())


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_tensor_galore_does_not_see_phases_while_the_frame_stands(dtype):
    start, gradients = series((4, 3, 3), dtype, steps=5)
    find = tucker((2, None, 2), n_iter=2)
    plain = run(TensorGaLore(start, ranks=(2, None, 2), find=find, **HYPER), gradients)
    turned = run(TensorGaLore(start, ranks=(2, None, 2), find=rephased(find), **HYPER), gradients)
    close(turned.p, plain.p)


def test_schedule_and_scale():
    assert [t for t in range(9) if every(3)(t)] == [0, 3, 6]
    assert [t for t in range(9) if every(3, phase=2)(t)] == [0, 2, 5, 8]
    start, gradients = series((6, 4), steps=1)
    one, match, muon = (
        run(TuckerAdam(start, 0.1, hosvd((3, 2)), scale=s), gradients).p - start for s in (1, "match", "0.2-match")
    )
    close(match, 2.0 * one)
    close(muon, 0.4 * one)


@pytest.fixture(scope="module")
def plain_class():
    spec = importlib.util.spec_from_file_location("plain_ldadam", PLAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlainLDAdam


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_plain_baseline_is_the_reference(plain_class, shape):
    start, gradients = series(shape, steps=5)
    p = torch.nn.Parameter(start.clone())
    optimizer = plain_class([p], rank=2, rho=0.7, **HYPER)
    reference = LDAdam(start, rank=2, rho=0.7, **HYPER)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        close(p.detach(), reference.step(g), 1e-8)
        assert torch.equal(p.grad, g)
    close(optimizer.state[p]["feedback"], reference.e, 1e-8)


def test_plain_baseline_refuses_what_it_does_not_take(plain_class):
    for bad in (torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(3, 3, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="real matrices only"):
            plain_class([torch.nn.Parameter(bad)], rank=1)
    with pytest.raises(ValueError, match="does not fit"):
        plain_class([torch.nn.Parameter(torch.zeros(3, 4))], rank=4)
