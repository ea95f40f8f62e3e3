"""Alike parameters stepped together are what each of them is alone."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer, build, recipes, state_bytes
from comoving.codecs import Int8
from comoving.finders import Exact, Power
from comoving.frames import Blocks, Modes
from comoving.residual import Feedback, Sparse
from comoving.rules import Adam
from comoving.slots import Kind, Slot
from comoving.transport import Carry, Reset
from pretend import OnDevice, Pretend, install

SHAPES = [(24, 16)] * 4 + [(16, 24)] * 2 + [(20, 12, 10)] * 3 + [(7,)]


def model(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes])


def give(params, step, idle=()):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        p.grad = None if i in idle else torch.randn(p.shape, generator=generator, dtype=p.dtype)


def pair(recipe, dtype=torch.float64, **options):
    models = model(dtype), model(dtype)
    optimizers = [build(recipe, m, 1e-2, **options) for m in models]
    optimizers[1].stacked_entries = 0
    return models, optimizers


def formed(optimizer):
    return optimizer.engine.batches


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_steps_a_batch_as_its_members(recipe):
    models, optimizers = pair(recipe)
    for step in range(8):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step, idle={1} if step == 4 else ())
            o.step()
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert not formed(optimizers[1])
    assert state_bytes(optimizers[0]) == state_bytes(optimizers[1])


def test_alike_parameters_are_stacked_and_others_are_not():
    models, (optimizer, _) = pair("tucker-adam")
    for step in range(3):
        give(models[0], step)
        optimizer.step()
    sizes = sorted(len(batch.rows) for batch in formed(optimizer))
    assert sum(sizes) >= 4
    assert all(size > 1 for size in sizes)


def test_nothing_is_stacked_again_while_the_states_are_untouched():
    m = model(shapes=[(24, 16)] * 3)
    optimizer = LowRankOptimizer(m.parameters(), 1e-2, 4)
    for step in range(3):
        give(m, step)
        optimizer.step()
    (before,) = formed(optimizer)
    stacks, stack = [], torch.stack

    def counting(tensors, *args):
        stacks.append(len(tensors))
        return stack(tensors, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "stack", counting)
        give(m, 3)
        optimizer.step()
    assert formed(optimizer) == [before]
    assert stacks.count(3) == 4  # gradients, their norms twice, weights


def test_a_batch_lasts_whose_frames_are_refreshed_one_by_one():
    m = model(shapes=[(24, 16)] * 3)
    optimizer = LowRankOptimizer(m.parameters(), 1e-2, 4, residual=Sparse(), refresh_every=6)
    batches = set()
    for step in range(14):
        give(m, step)
        optimizer.step()
        batches |= {*formed(optimizer)}
    assert len(batches) == 1


def test_a_slot_that_was_replaced_or_written_to_counts():
    models, optimizers = pair("tucker-adam")
    for step in range(6):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()
            if step == 2:
                o.state[m[1]]["moment.first"] = torch.ones_like(o.state[m[1]]["moment.first"])
            if step == 3:
                o.state[m[2]]["moment.first"].zero_()
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@dataclass(frozen=True)
class Lagged:
    """A rule of the user's own that steps by the momentum of the step before, which it hands from slot to slot."""

    momentum = "moment.first"
    batched = linear = definite = elementwise = timeless = replays = replaces = True
    corrected = total = False

    def slots(self, shape):
        return (Slot("moment.first", Kind.LINEAR), Slot("moment.last", Kind.LINEAR))

    def recursion(self, clock):
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z, state, clock):
        state["moment.last"] = state["moment.first"]
        state["moment.first"] = state["moment.first"].lerp(z, 1 - clock.beta1)

    def direction(self, state, clock, eps):
        return state["moment.last"] + state["moment.first"]


def test_a_slot_may_take_over_the_tensor_of_another():
    results = []
    for entries in (2**16, 0):
        m = model(shapes=[(24, 16)] * 3)
        optimizer = LowRankOptimizer(m.parameters(), 1e-2, 4, rule=Lagged(), transport=Reset(), refresh_every=4)
        optimizer.stacked_entries = entries
        for step in range(7):
            give(m, step)
            optimizer.step()
        results.append(m)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_later_steps_leave_what_was_given_out_as_it_was():
    models, optimizers = pair("comoving-adamw", refresh_every=3)
    kept = []
    for step in range(9):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()
        if step == 3:
            kept = [(o.state_dict(), [p.detach().clone() for p in m]) for m, o in zip(models, optimizers, strict=True)]
    for m, o, (state, weights) in zip(models, optimizers, kept, strict=True):
        o.load_state_dict(state)
        with torch.no_grad():
            for p, w in zip(m, weights, strict=True):
                p.copy_(w)
        for step in range(4, 9):
            give(m, step)
            o.step()
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("edit", ["data", "count", "taken away"])
def test_what_tools_do_to_states_counts(edit):
    models, optimizers = pair("tucker-adam")
    for step in range(8):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step, idle={1} if edit == "taken away" and step in {4, 5} else ())
            o.step()
            state = o.state[m[1]] if m[1] in o.state else {}
            if step == 3 and edit == "data":
                for x in state.values():
                    if isinstance(x, torch.Tensor):
                        x.data = x.data * 0.5 if x.is_floating_point() and x.ndim > 1 else x.data.clone()
            elif step == 3 and edit == "count":
                state["step"].zero_()
            elif step == 3:
                del o.state[m[1]]
        if edit == "taken away" and step in {3, 4, 5}:
            assert all(m[1] not in o.state for m, o in zip(models, optimizers, strict=True))
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert [float(o.state[m[1]]["step"]) for m, o in zip(models, optimizers, strict=True)] == (
        {"data": [8, 8], "count": [4, 4], "taken away": [2, 2]}[edit]
    )


def test_rows_that_missed_different_steps_have_counts_of_their_own(monkeypatch):
    """On a device, where the host does not know which of them were skipped."""
    install(monkeypatch)
    results = []
    for entries in (2**16, 0):
        with Pretend():
            m = [nn.Parameter(OnDevice(p.detach())) for p in model(torch.float32, [(12, 8)] * 3)]
            optimizer = LowRankOptimizer(m, 1e-2, 4, refresh_every=3, on_nonfinite="skip")
            optimizer.stacked_entries = entries
            for step in range(9):
                for i, p in enumerate(m):
                    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
                    g[0, 0] = torch.nan if step == 3 else g[0, 0]
                    p.grad = None if (i, step) in {(0, 3), (1, 5)} else OnDevice(g)
                optimizer.step()
            results.append([p.own for p in m])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_write_that_fails_leaves_all_rows_as_they_were(monkeypatch):
    m = model(torch.bfloat16, [(24, 16)] * 3)
    optimizer = build("comoving-adamw", m, 1e-2, rounding="stochastic", refresh_every=3)
    for step in range(4):
        give(m, step)
        optimizer.step()
    before, calls = [p.detach().clone() for p in m], []
    rounded = comoving.rounding.stochastic_bfloat16

    def fails(x, random):
        calls.append(x)
        if len(calls) == 2:
            raise MemoryError("no more")
        return rounded(x, random)

    give(m, 4)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(comoving.rounding, "stochastic_bfloat16", fails)
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(m, before, strict=True))
    assert [float(optimizer.state[p]["step"]) for p in m] == [4] * 3


def test_experts_whose_step_failed_keep_one_batch(monkeypatch):
    p = nn.Parameter(model(shapes=[(6, 12, 10)])[0].detach())
    optimizer = LowRankOptimizer([p], 1e-2, 3, frame=Blocks(), refresh_every=2)
    for step in range(8):
        give([p], step)
        if step % 2:
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(Adam, "direction", lambda *_: (_ for _ in ()).throw(MemoryError()))
                optimizer.step()
        optimizer.step()
        assert len(formed(optimizer)) <= 1
    for name in [name for name in optimizer.state[p] if name.startswith("2.")]:
        del optimizer.state[p][name]
    optimizer.step()
    assert float(optimizer.state[p]["2.step"]) == 1
    optimizer.state[p].clear()
    optimizer.step()
    assert float(optimizer.state[p]["0.step"]) == 1


def test_another_dict_of_states_counts():
    """As tools make one that move or restore what an optimizer holds."""
    models, optimizers = pair("tucker-adam")
    for step in range(6):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()
            if step == 3:
                o.state = type(o.state)(dict, {p: {n: copy.copy(x) for n, x in s.items()} for p, s in o.state.items()})
                o.state[m[0]]["moment.first"] = o.state[m[0]]["moment.first"] * 2
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_rates_that_change_at_every_step_leave_batches_as_they_are():
    models, (optimizer, _) = pair("comoving-adamw")
    for step in range(4):
        give(models[0], step)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        optimizer.step()
        if step == 1:
            before = formed(optimizer)
    assert before and formed(optimizer) == before


@pytest.mark.parametrize("recipe", ["comoving-adamw", "galore", "muon"])
def test_checkpoints_do_not_know_of_batches(recipe):
    models, optimizers = pair(recipe)
    for step in range(5):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()
    first, second = (o.state_dict() for o in optimizers)
    assert [*first["state"]] == [*second["state"]]
    for key, state in first["state"].items():
        assert {n: getattr(x, "shape", x) for n, x in state.items()} == {
            n: getattr(x, "shape", x) for n, x in second["state"][key].items()
        }
    fresh = model()
    loaded = build(recipe, fresh, 1e-2)
    fresh.load_state_dict(models[0].state_dict())
    loaded.load_state_dict(first)
    copied = copy.deepcopy((models[0], optimizers[0]))
    optimizers[1].load_state_dict(first)
    assert not formed(optimizers[1])
    for step in range(5, 9):
        for m, o in ((models[0], optimizers[0]), (fresh, loaded), copied):
            give(m, step)
            o.step()
    for p, q, r in zip(models[0], fresh, copied[0], strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_a_batch_that_raises_leaves_all_of_it_as_it_was():
    models, optimizers = pair("tucker-adam")
    for step in range(4):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()
    optimizer, params = optimizers[0], list(models[0])
    weights = [p.detach().clone() for p in params]
    states = [{n: copy.copy(x) for n, x in optimizer.state[p].items()} for p in params]

    def fails(*args, **kwargs):
        raise MemoryError("no more")

    give(params, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adam, "direction", fails)
        with pytest.raises(MemoryError):
            optimizer.step()
    for p, before, state in zip(params, weights, states, strict=True):
        if optimizer.sites[p].plain:
            continue
        assert torch.equal(p, before)
        assert all(optimizer.state[p][n] is x or optimizer.state[p][n] == x for n, x in state.items() if n == "tick")
    optimizer.step()
    give(models[1], 4)
    optimizers[1].step()
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"moments": Int8()}, {"residual": Feedback(), "codec": Int8()}], ids=str)
@pytest.mark.parametrize("transport", [Carry(), Reset()], ids=str)
@pytest.mark.parametrize("finder", [Power(exact_up_to=8), Exact()], ids=str)
def test_experts_are_rows(finder, transport, options):
    experts, results = 6, []
    for entries in (2**16, 0):
        m = model(shapes=[(experts, 24, 16)])
        optimizer = LowRankOptimizer(
            m.parameters(),
            1e-2,
            4,
            frame=Blocks(0, Modes()),
            finder=finder,
            transport=transport,
            refresh_every=2,
            **options,
        )
        optimizer.stacked_entries = entries
        for step in range(7):
            give(m, step)
            m[0].grad[step % experts] = 0
            m[0].grad[(2 * step) % experts] = 0
            optimizer.step()
        results.append((m[0].detach(), formed(optimizer)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-11)
    assert results[0][1]
    assert not results[1][1]


def test_bfloat16_rounds_each_parameter_by_its_own_seed():
    models = model(torch.bfloat16), model(torch.bfloat16)
    optimizers = [build("comoving-adamw", m, 1e-2, rounding="stochastic", refresh_every=3) for m in models]
    optimizers[1].stacked_entries = 0
    for step in range(6):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()
    assert formed(optimizers[0])
    for p, q in zip(*models, strict=True):
        assert (p != q).float().mean() < 0.01  # an entry at the edge may be rounded to either side
        torch.testing.assert_close(p.float(), q.float(), rtol=0.02, atol=0.02)


def test_skipped_steps_of_a_batch():
    models = model(), model()
    optimizers = [build("tucker-adam", m, 1e-2, refresh_every=3, on_nonfinite="skip") for m in models]
    optimizers[1].stacked_entries = 0
    for step in range(6):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            if step == 3:
                m[1].grad[0, 0] = torch.nan
            o.step()
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert [o.skipped_steps for o in optimizers] == [1, 1]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("roles", [("bases",), ("moments", "codec"), ("bases", "moments", "codec")], ids="+".join)
def test_codes_are_each_rows_own(roles, rounding):
    results = []
    for entries in (2**16, 0):
        m = model()
        options = {role: Int8(rounding=rounding) for role in roles} | {"residual": Feedback()}
        optimizer = LowRankOptimizer(m.parameters(), 1e-2, 4, refresh_every=2, **options)
        optimizer.stacked_entries = entries
        for step in range(6):
            give(m, step)
            optimizer.step()
        results.append((m, formed(optimizer)))
    assert results[0][1] and not results[1][1]
    for p, q in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # an entry at an edge may get the code beside


@pytest.mark.parametrize("residual", [comoving.residual.Discard(), Feedback()], ids=str)
def test_experts_in_a_clipped_window(residual):
    results = []
    for entries in (2**16, 0):
        m = model(shapes=[(5, 24, 16)])
        optimizer = LowRankOptimizer(
            m.parameters(), 1e-2, 4, frame=Blocks(0, Modes()), finder=Exact(), residual=residual, refresh_every=2
        )
        optimizer.stacked_entries = entries
        optimizer.step_in_backward(accumulate=2, clip=0.5)
        for step in range(5):
            for part in range(2):
                generator = torch.Generator().manual_seed(10 * step + part)
                (m[0] * torch.randn(m[0].shape, generator=generator, dtype=m[0].dtype)).sum().backward()
            optimizer.step()
        results.append(m[0].detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
