"""Experts and heads: every block is optimized as if it were a parameter of its own, and idle ones are left alone."""

import io

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import Int8
from comoving.finders import Exact, Power
from comoving.frames import Blocks
from comoving.residual import Feedback
from comoving.section import Section
from comoving.transport import Carry, Rotate
from comoving.views import Heads
from contract.support import COMPLEX, REAL, close, lone, randn

OPTIONS = {
    "lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "refresh_every": 2, "finder": Exact(),
    "residual": Feedback(), "transport": Carry(), "scale": "match",
}  # fmt: skip


def separate(parts, **options):
    """An optimizer of each part alone, as a list of pairs; small blocks all refresh at the same steps, as parts do."""
    return [lone(part, **(OPTIONS | options)) for part in parts]


def compare(p, optimizer, cut, parts, gradient, steps=7, tolerance=1e-10):
    """Step the whole and its parts side by side; a part whose gradient is zero is not stepped."""
    for t in range(steps):
        g = gradient(t)
        p.grad = g.clone()
        optimizer.step()
        for (q, own), block in zip(parts, cut(g), strict=True):
            if block.any():
                q.grad = block.contiguous().clone()
                own.step()
        for (q, _), block in zip(parts, cut(p.detach()), strict=True):
            close(block, q.detach(), tolerance)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("rank", [2, (None, 3), (2, 2)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_each_block_is_a_parameter_of_its_own(mode, rank, dtype):
    shape = [7, 9]
    shape.insert(mode, 4)
    start = randn(shape, dtype)
    p, optimizer = lone(start, rank=rank, frame=Blocks(mode), **OPTIONS)
    parts = separate([b.contiguous() for b in start.unbind(mode)], rank=rank)
    compare(p, optimizer, lambda x: x.unbind(mode), parts, lambda t: randn(shape, dtype, 10 + t))
    names = set(optimizer.diagnostics())
    assert names == {f"parameter 0[{b}]" for b in range(4)}


@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
def test_idle_experts_are_left_alone(transport):
    """A part of the experts gets no token: weights, moments and step counts stay; one never used has no state."""
    start, used = randn((5, 8, 12)), {0: [0, 2], 1: [2], 2: [0, 1], 3: [0, 1, 2], 4: [1]}
    p, optimizer = lone(
        start, rank=3, frame=Blocks(), **(OPTIONS | {"transport": comoving.parts.part("transport", transport)})
    )
    parts = separate(start.unbind(0), rank=3, transport=comoving.parts.part("transport", transport))

    def gradient(t):
        g = torch.zeros_like(start)
        for b in used[t % 5]:
            g[b] = randn((8, 12), REAL, 50 * t + b)
        return g

    compare(p, optimizer, lambda x: x.unbind(0), parts, gradient, steps=10)
    assert {name.partition(".")[0] for name in optimizer.state[p]} == {"0", "1", "2"}
    assert torch.equal(p[3:], start[3:])
    assert [int(optimizer.state[p][f"{b}.step"]) for b in range(3)] == [6, 6, 6]


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_a_fused_projection(side, dtype):
    """Query, key and value in one weight of 3 x 2 heads of 6 rows (or columns), each with a frame of its own."""
    shape = (36, 16) if side == "rows" else (16, 36)
    view, mode = Heads(6, side), 0 if side == "rows" else 1
    start = randn(shape, torch.float32).to(dtype)
    p, optimizer = lone(start, rank=2, view=view, frame=Blocks(mode), **OPTIONS)

    def cut(x):
        return x.split(6, dim=mode)

    parts = separate([b.contiguous() for b in cut(start)], rank=2)
    compare(p, optimizer, cut, parts, lambda t: randn(shape, torch.float32, t).to(dtype), tolerance=1e-5)
    assert optimizer.sites[p].view.shape == ((6, 6, 16) if side == "rows" else (16, 6, 6))


class Mixture(nn.Module):
    """Experts, fused attention, an output projection, and something dense."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(randn((4, 16, 24), torch.float32))
        self.qkv = nn.Linear(16, 48, bias=False)
        self.proj = nn.Linear(16, 16)
        nn.init.ones_(self.proj.bias)
        for i, w in enumerate((self.qkv.weight, self.proj.weight)):
            w.data = randn(w.shape, torch.float32, i + 1)


def mixture_optimizer(model, **options):
    heads = {"qkv.weight": 8, "proj.weight": Heads(8, "columns")}
    return comoving.build("comoving-adamw", model, 1e-2, rank=2, experts=["experts"], heads=heads, **options)


def train(model, optimizer, first, last, idle=(3,)):
    for t in range(first, last):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(p.shape, torch.float32, 20 * t + i)
        for b in idle:
            model.experts.grad[b] = 0
        optimizer.step()


def test_param_groups_and_explain_name_the_blocks():
    model = Mixture()
    optimizer = mixture_optimizer(model)
    views = {row.parameter: row.view for row in comoving.explain(optimizer).rows}
    assert views == {
        "experts": "tensor, 4 blocks",
        "qkv.weight": "heads, 6 blocks",
        "proj.weight": "heads, 2 blocks",
        "proj.bias": "torch",
    }
    train(model, optimizer, 0, 3, idle=())
    rows = {row.parameter: row.bytes for row in comoving.explain(optimizer).rows}
    assert comoving.state_bytes(optimizer) == sum(rows.values())
    assert comoving.state_bytes(optimizer, projected=True) == sum(rows.values()) - rows["proj.bias"]


def test_a_resumed_run_is_bitwise_the_same():
    straight, resumed = Mixture(), Mixture()
    train(straight, mixture_optimizer(straight), 0, 9)
    optimizer = mixture_optimizer(resumed)
    train(resumed, optimizer, 0, 5)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert all(not isinstance(x, dict) for state in saved["state"].values() for x in state.values())
    again = mixture_optimizer(resumed)
    again.load_state_dict(saved)
    assert not any(name.startswith("3.") for name in again.state[resumed.experts])
    train(resumed, again, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_has_slots_for_experts_that_were_idle():
    """So that its keys are those of a fresh optimizer that has stepped by zeros, as torch makes one have a state."""
    model, asked = Mixture(), Mixture()
    optimizer, fresh = mixture_optimizer(model, moments=Int8()), mixture_optimizer(asked, moments=Int8())
    assert fresh.state_dict()["state"] == {}
    train(model, optimizer, 0, 4)
    for p in asked.parameters():
        p.grad = torch.zeros_like(p)
    fresh.step()
    saved, other = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert {key: {*state} for key, state in saved.items()} == {key: {*state} for key, state in other.items()}
    shapes = [
        {name: x.shape for name, x in state[0].items() if isinstance(x, torch.Tensor)} for state in (saved, other)
    ]
    assert shapes[0] == shapes[1] and any(name.startswith("3.frame.") for name in shapes[0])


def test_a_checkpoint_of_more_experts_is_refused_though_the_others_were_idle():
    model = Mixture()
    optimizer = mixture_optimizer(model)
    train(model, optimizer, 0, 2)  # never the last
    fewer = Mixture()
    fewer.experts = torch.nn.Parameter(fewer.experts.detach()[:3].clone())
    with pytest.raises(ValueError, match="belongs to none of 3 blocks"):
        mixture_optimizer(fewer).load_state_dict(optimizer.state_dict())


def test_adamw_state_is_cut_into_blocks():
    model = Mixture()
    theirs = torch.optim.AdamW([("experts", model.experts)], lr=1e-2)
    for t in range(4):
        model.experts.grad = randn((4, 16, 24), torch.float32, t)
        theirs.step()
    moments = theirs.state[model.experts]
    ours = LowRankOptimizer([("experts", model.experts)], 0.0, 3, frame=Blocks(), finder=Exact())
    ours.load_state_dict(theirs.state_dict())
    for b in range(4):
        assert torch.equal(ours.state[model.experts][f"{b}.moment.first"], moments["exp_avg"][b])
        assert int(ours.state[model.experts][f"{b}.step"]) == 4
    model.experts.grad = torch.zeros(4, 16, 24)
    model.experts.grad[1] = randn((16, 24), torch.float32)
    ours.step()
    moved = Section(ours.state[model.experts], "1")
    assert moved["moment.first"].shape == (3, 24)
    close(
        moved["moment.first"], moved["frame.0"].mH @ (0.9 * moments["exp_avg"][1] + 0.1 * model.experts.grad[1]), 1e-5
    )


def test_a_skipped_step_leaves_blocks_as_they_were():
    model = Mixture()
    optimizer = mixture_optimizer(model, on_nonfinite="skip")
    train(model, optimizer, 0, 3)
    before = [p.detach().clone() for p in model.parameters()]
    counts = {b: int(optimizer.state[model.experts][f"{b}.step"]) for b in range(3)}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert counts == {b: int(optimizer.state[model.experts][f"{b}.step"]) for b in range(3)}


def test_accumulation_windows_are_each_blocks_own():
    """Block 0 is active in the first half only, block 1 in the second: each is stepped once, on its own sum."""
    start = randn((3, 8, 12))
    p, optimizer = lone(start, rank=3, frame=Blocks(), **OPTIONS)
    parts = separate(start.unbind(0), rank=3)
    for t in range(4):
        halves = [torch.zeros_like(start), torch.zeros_like(start)]
        for half in (0, 1):
            halves[half][half] = randn((8, 12), REAL, 7 * t + half)
            optimizer.absorb(p, halves[half])
        optimizer.apply(p)
        for b in (0, 1):
            q, own = parts[b]
            own.absorb(q, halves[b][b])
            own.apply(q)
            close(p[b].detach(), q.detach(), 1e-10)
    assert torch.equal(p[2], start[2])


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        ((8, 12), {"frame": Blocks()}, r"blocks along mode 0 need .* got shape \(8, 12\)"),
        ((4, 8, 12), {"frame": Blocks(3)}, r"blocks along mode 3 .* got shape \(4, 8, 12\)"),
        ((0, 8, 12), {"frame": Blocks()}, r"blocks along mode 0 of shape \(0, 8, 12\) are empty"),
        ((4, 0, 12), {"frame": Blocks()}, r"blocks along mode 0 of shape \(4, 0, 12\) are empty"),
        ((8, 12), {"view": Heads(5)}, r"heads of 5 rows do not fill a tensor of shape \(8, 12\)"),
        ((4, 8, 12), {"view": Heads(4)}, r"heads of 4 rows do not fill"),
        ((4, 8, 12), {"frame": Blocks(), "rank": (2, None, None)}, "has 3 entries, a tensor of shape .* needs 2"),
    ],
)
def test_what_does_not_fit_is_refused(start, options, message):
    with pytest.raises(ValueError, match=message):
        lone(randn(start), **({"rank": 2} | options))


def test_selectors_that_overlap_are_refused():
    with pytest.raises(ValueError, match="qkv.weight can be seen in one way only"):
        comoving.param_groups(Mixture(), experts=["qkv.weight"], heads={"qkv.*": 8})


def test_a_checkpoint_with_other_blocks_is_refused():
    model = Mixture()
    optimizer = mixture_optimizer(model)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    first = saved["state"][0]
    first["7.step"] = first["0.step"]
    with pytest.raises(ValueError, match=r"7\.step in the checkpoint belongs to none of 4 blocks"):
        mixture_optimizer(Mixture()).load_state_dict(saved)


@pytest.mark.parametrize(("value", "error", "message"), [(0, ValueError, "size must .*>= 1"), ("a", TypeError, "size")])
def test_head_sizes_are_checked(value, error, message):
    with pytest.raises(error, match=message):
        Heads(value)
    with pytest.raises(ValueError, match="side must be one of"):
        Heads(4, "top")


def test_default_finder_and_codec_train_experts():
    """Blocks of a quadratic: the active experts reach their target, the idle one keeps its place."""
    target = randn((3, 16, 16), torch.float32, 1)
    p, optimizer = lone(
        torch.zeros(3, 16, 16),
        rank=4,
        frame=Blocks(),
        finder=Power(),
        residual=Feedback(),
        codec=Int8(),
        lr=0.05,
        weight_decay=0.0,
    )
    for _ in range(300):
        g = p.detach() - target
        g[2] = 0
        p.grad = g
        optimizer.step()
    assert (p[:2] - target[:2]).norm() < 0.1 * target[:2].norm()
    assert not p[2].any()
