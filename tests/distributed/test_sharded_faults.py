"""Gradients that are bad in one process, what is refused, and what is empty or missing."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

import comoving
from comoving.codecs import Int8
from comoving.ranks import Energy
from distributed.placed import STEADY, assert_same, built, give, here, made, mesh_of, stepped, weights_of, where
from distributed.processes import run

SHAPES = {"tall": (24, 10), "twin": (24, 10), "odd": (13, 11), "kernel": (10, 9, 8), "few": (5, 16), "bias": (24,)}
RECIPES = {"comoving-adamw": STEADY, "muon": {}, "adamw": {}, "low-rank-soap": {"refresh_every": 3}}
HOST = "tick"  # refreshes are timed by it; skipped steps count, as for one process


def sharded(shapes=SHAPES):
    return made(shapes, {"*": [Shard(0)]}, mesh_of([2]))


def _snapshot(params, optimizer):
    state = {
        (name, slot): x.clone() if isinstance(x, Tensor) else x
        for name, p in params.items()
        for slot, x in optimizer.state.get(p, {}).items()
        if slot != HOST
    }
    return state | {name: here(p.detach()).clone() for name, p in params.items()}


def _same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, b[key]) if isinstance(x, Tensor) else x == b[key] for key, x in a.items()
    )


def _bad(rank, recipe, policy, at):
    found = []
    for target, culprit in (("tall", 0), ("kernel", 1), ("few", 1), ("bias", 0)):
        params = sharded()
        optimizer = built(params, recipe, RECIPES[recipe] | {"on_nonfinite": policy})
        for step in range(6):
            give(params, step)
            if step == at:
                before, message = _snapshot(params, optimizer), ""
                if rank == culprit:
                    here(params[target].grad)[0] = torch.nan
                try:
                    optimizer.step()
                except RuntimeError as error:
                    message = str(error)
                assert _same(before, _snapshot(params, optimizer)), target
                assert ("non-finite gradient" in message) == (policy == "raise")
                if policy == "raise":
                    assert (target if rank == culprit else "another process") in message
                give(params, step)
            optimizer.step()
        found.append((weights_of(params), optimizer.skipped_steps))
    return found


def _alone(recipe, policy, at):
    params = made(SHAPES)
    optimizer = built(params, recipe, RECIPES[recipe] | {"on_nonfinite": policy})
    for step in range(6):
        give(params, step)
        if step == at and policy == "skip":  # which shifts refreshes by a step
            params["tall"].grad[0] = torch.nan
            optimizer.step()
            give(params, step)
        optimizer.step()
    return weights_of(params)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_gradient_in_one_process_is_seen_by_all(recipe, policy):
    for at in (0, 4):
        expected = _alone(recipe, policy, at)
        for found in run(2, _bad, recipe, policy, at):
            for weights, skipped in found:
                assert_same(weights, expected)
                assert skipped == (policy == "skip")


def _message(call, *args, **options):
    try:
        call(*args, **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _refusals(rank):
    params, mesh, found = sharded(), mesh_of([2]), {}
    optimizer = built(params, "comoving-adamw", STEADY)
    give(params, 0)
    optimizer.step()
    give(params, 1)
    before, others = _snapshot(params, optimizer), sharded({"kernel": (10, 9, 8)})
    owned, p = built(others, "muon", {}), others["kernel"]
    give(others, 0)
    found["budget"] = _message(comoving.LowRankOptimizer, params.items(), budget="25%")
    partial = nn.Parameter(DTensor.from_local(torch.zeros(8, 4), mesh, [Partial()]))
    found["partial"] = _message(comoving.LowRankOptimizer, [("p", partial)])
    found["absorb"] = _message(owned.absorb, p, p.grad)
    found["apply"] = _message(owned.apply, p)
    found["placed"] = _message(optimizer.absorb, params["tall"], params["tall"].grad.full_tensor())
    found["capture"] = _message(optimizer.capture)
    assert _same(before, _snapshot(params, optimizer))
    return found


def test_what_is_refused_says_why():
    for found in run(2, _refusals):
        assert "budget" in found["budget"] and "give rank, codec and moments" in found["budget"]
        assert "shard or replicate it" in found["partial"]
        assert "only step() serves it" in found["absorb"] and "only step() serves it" in found["apply"]
        assert "must be a DTensor" in found["placed"]
        assert "CUDA" in found["capture"]


def _absorbed(rank):
    params = sharded({"tall": (24, 10), "odd": (13, 11)})
    optimizer = built(params, "comoving-adamw", STEADY)
    for step in range(4):
        give(params, step)
        for p in params.values():
            optimizer.absorb(p, p.grad)
            p.grad = None
            optimizer.apply(p)
    return weights_of(params)


def test_what_is_stepped_where_it_is_can_be_absorbed_and_applied():
    weights, _ = stepped(made({"tall": (24, 10), "odd": (13, 11)}), "comoving-adamw", STEADY, 4)
    for own in run(2, _absorbed):
        assert_same(own, weights)


def _several(params, more):
    """Groups come and go, parameters miss steps, and ranks adapt."""
    optimizer = built(params, "comoving-adamw", STEADY)
    give(params, 0)
    optimizer.step()
    for p in params.values():
        p.grad = None
    optimizer.step()
    give(params, 1)
    params["twin"].grad = params["kernel"].grad = None
    optimizer.step()
    optimizer.add_param_group({"params": [*more.items()], "ranks": Energy()})
    for step in (2, 3, 4, 5):
        give(params | more, step)
        optimizer.step()
    optimizer.remove_param_group(0)
    give(more, 6)
    optimizer.step()
    return weights_of(params | more), where(optimizer)


def _of_two(rank):
    return _several(sharded(), sharded({"c": (12, 8), "d": (8, 9, 8)}))


def test_groups_missing_gradients_and_adaptive_ranks():
    weights, _ = _several(made(SHAPES), made({"c": (12, 8), "d": (8, 9, 8)}))
    for own, places in run(2, _of_two):
        assert_same(own, weights)
        assert places == {"c": "dealt", "d": "dealt"}


def _empty(rank):
    for recipe, options in RECIPES.items():
        params = sharded({"rows": (0, 8), "columns": (8, 0), "vector": (0,), "few": (5, 16)})
        _, optimizer = stepped(params, recipe, options, 4)
        optimizer.load_state_dict(optimizer.state_dict())
        give(params, 4)
        optimizer.step()


def test_parameters_without_entries():
    run(2, _empty)


def _disagreeing(rank):
    """What is said of a rate, a rank and a recipe that the second process has otherwise."""
    found = {}
    for name, options in {
        "betas": {"betas": (0.9, 0.95)},
        "refresh_every": {"refresh_every": 9},
        "rule": {"rule": "lion"},
    }.items():
        params = sharded({"tall": (24, 10), "odd": (13, 11)})
        optimizer = built(params, "comoving-adamw", STEADY | (options if rank else {}))
        give(params, 0)
        before = _snapshot(params, optimizer)
        found[name] = _message(optimizer.step)
        assert _same(before, _snapshot(params, optimizer))
    return found


def test_processes_that_disagree_raise_at_the_first_step_and_name_the_parameter():
    for found in run(2, _disagreeing):
        for name in ("betas", "refresh_every", "rule"):
            assert f"disagree about {name}" in found[name] and "of tall" in found[name]


def _explained(rank):
    params = sharded({"tall": (24, 10), "kernel": (16, 16, 16), "vector": (6,)})
    optimizer = built(params, "comoving-adamw", STEADY | {"moments": Int8(rounding="stochastic")})
    give(params, 0)
    optimizer.step()
    found = comoving.explain(optimizer)
    return {row.parameter: (row.why, row.bytes) for row in found.rows}, comoving.state_bytes(optimizer)


def test_explain_says_who_steps_what():
    for rank, (rows, size) in enumerate(run(2, _explained)):
        assert rows["vector"][0].endswith("; 3 of 6 along mode 0 are here")
        assert rows["kernel"][0].endswith("; 8 of 16 along mode 0 are here, and all of its core")
        assert "process 0 of those that share it steps it" in rows["tall"][0]
        assert (rows["tall"][1] == 0) is (rank == 1)
        assert sum(bytes_ for _, bytes_ in rows.values()) == size
