"""Windows of compress(): several backward passes are taken up as cores, which are sent once."""

import torch

from comoving import LowRankOptimizer
from comoving.distributed import compress
from comoving.distributed.wires import wire as wire_of
from comoving.finders import Power
from comoving.residual import Feedback
from contract.support import close, feedback_of
from distributed.models import Net, loss_of, optimizer_of, slots_of, weights_of, wrapped
from distributed.processes import run
from distributed.test_compress import projected
from distributed.test_compress_faults import Experts, choices, experts_optimizer, inputs, raised

STEPS = 6
PASSES = 2
CASES = {"default": {}, "views": {"gradient_as_bucket_view": True}, "cut": {"bucket_cap_mb": 0.001}}


def _windows(rank):
    found = {}
    for name, options in CASES.items():
        counts = []
        for passes in (PASSES, 1):
            ddp = wrapped(Net(), **options)
            optimizer = optimizer_of(ddp.module)
            sent = compress(ddp, optimizer, "same", passes)
            for t in range(STEPS):
                for i in range(passes):
                    loss_of(ddp, 10 * t + i, rank).backward()
                optimizer.step()
                optimizer.zero_grad()
            counts.append(sent)
            if passes == PASSES:
                found[name] = weights_of(ddp.module), slots_of(optimizer), kept(optimizer)
        assert [(c.dense.bytes, c.frames.bytes) for c in counts] == [
            (c.dense.bytes, c.frames.bytes) for c in counts[:1]
        ] * 2, counts
        assert abs(counts[0].cores.bytes - counts[1].cores.bytes) <= 4 * 10  # flags: the first pass has other buckets
    for i in range(PASSES + 1):
        found[i] = raised(optimizer_step, rank, i)
    return found, _experts(rank), [_rounding(rank, wire) for wire in ("bfloat16", "int8")]


def kept(optimizer):
    return [feedback_of(optimizer, p) for p in projected(optimizer)]


def optimizer_step(rank, passes):
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module)
    compress(ddp, optimizer, "same", PASSES)
    for i in range(passes):
        loss_of(ddp, i, rank).backward()
    optimizer.step()


def _experts(rank):
    ddp = wrapped(Experts(), find_unused_parameters=True)
    optimizer = experts_optimizer(ddp.module)
    compress(ddp, optimizer, "same", PASSES)
    for t in range(8):
        for i in range(PASSES):
            ddp(inputs(t + i, rank), *choices(t + i, rank), i).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(ddp.module)


def _rounding(rank, name):
    """How far what is sent is from what feedback thinks it is, and from what was given less what is kept; relative."""
    ddp = wrapped(Experts(), find_unused_parameters=True)
    options = dict(residual=Feedback(), refresh_every=100, finder=Power())
    optimizer = LowRankOptimizer([("first", ddp.module.first)], 0.01, 3, select="shape", **options)
    compress(ddp, optimizer, name, PASSES)
    driver, wire, far = optimizer._driver, wire_of(name), []
    send, p = driver._send, ddp.module.first
    seen, used = torch.zeros_like(p), []

    def watched(cores):
        far.extend(float((wire.sent(x, rows) - x).norm() / x.norm().clamp_min(1e-30)) for x, rows in cores[:-1])
        return send(cores)

    def note(g):
        seen.add_(g)

    driver._send = watched
    p.register_hook(note)
    for t in range(6):
        for i in range(PASSES):
            ddp(inputs(t + i, rank), *choices(t + i, rank), i).backward()  # the second pass leaves this one out
        cell = driver._open[optimizer.engine.row(p)].cell
        used.append(cell.frame.lift(cell.open.core).view(p.shape))
        optimizer.step()
        optimizer.zero_grad()
    lost = seen - sum(used) - feedback_of(optimizer, p)
    return max(far), float(lost.norm() / seen.norm())


def expected():
    model = Net()
    optimizer = optimizer_of(model)
    for t in range(STEPS):
        for i in range(PASSES):
            (sum(loss_of(model, 10 * t + i, rank) for rank in range(2)) / 2).backward()
            absorb(optimizer, projected(optimizer))
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), slots_of(optimizer), kept(optimizer)


def absorb(optimizer, params):
    for p in params:
        if p.grad is not None:
            optimizer.absorb(p, p.grad)
            p.grad = None


def expected_of_experts():
    model = Experts()
    optimizer = experts_optimizer(model)
    for t in range(8):
        for i in range(PASSES):
            (sum(model(inputs(t + i, rank), *choices(t + i, rank), i) for rank in range(2)) / 2).backward()
            absorb(optimizer, model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def test_a_window_is_sent_once_and_steps_as_one_process_with_the_mean():
    """Weights, frames, moments, and the mean of what is kept; as many bytes as one pass; unused ones; rounding."""
    results = run(2, _windows)
    weights, slots, feedback = expected()
    for name in CASES:
        own = [found[name] for found, _, _ in results]
        for key, w in weights.items():
            assert torch.equal(own[1][0][key], own[0][0][key])
            close(own[0][0][key], w, 1e-9)
        for key, x in slots.items():
            if key[1] != "diagnostics":
                close(own[0][1][key], x, 1e-9)
        for i, e in enumerate(feedback):
            close(torch.stack([other[2][i] for other in own]).mean(0), e, 1e-9)
    experts = expected_of_experts()
    for found, weights, rounding in results:
        assert "nothing" in found[0] and "of which 2 send" in found[1] and "nothing" in found[2]
        for name, w in experts.items():
            close(weights[name], w, 1e-9)
        for again, lost in rounding:
            assert again < 1e-6 and lost < 1e-9
