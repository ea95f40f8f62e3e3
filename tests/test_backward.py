"""Stepping inside the backward pass: the same steps, without gradients that pile up."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import comoving
from comoving import LowRankOptimizer, build
from comoving.codecs import Int8
from comoving.drivers.taken import TakenUp
from comoving.finders import Exact
from comoving.precondition import Kronecker
from comoving.residual import Discard, Feedback, Fira, MomentumBuffer, Sign, Sparse
from comoving.transport import Keep, Rotate

REAL = torch.float64


class Net(nn.Module):
    """Layers of all kinds: an embedding, matrices tall and wide, a complex tensor, a tied head, norms."""

    def __init__(self, dtype=torch.float32, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, 16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 24, bias=False)
        self.to(dtype)
        self.spectral = nn.Parameter(0.1 * torch.randn(16, 16, 3, dtype=dtype.to_complex()))
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        h = h + self.down(torch.relu(self.up(h)))
        h = h + torch.einsum("bti,iok->bto", h.to(self.spectral.dtype), self.spectral).real.to(h.dtype)
        return self.lm_head(self.norm(h))


def loss_of(model, t, scale=1.0):
    generator = torch.Generator().manual_seed(t)
    x = torch.randint(0, 24, (4, 6), generator=generator)
    y = torch.randint(0, 24, (4, 6), generator=generator)
    return scale * nn.functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def train(model, optimizer, steps, accumulate=1, scheduler=None, scale=1.0):
    for t in steps:
        for k in range(accumulate):
            (loss_of(model, 100 * t + k, scale) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def close(a, b, tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def gone(p):
    return p.grad is None or isinstance(p.grad, TakenUp)


# ------------------------------------------------------------------------------------------------------- the same steps


@pytest.mark.parametrize("recipe", sorted(comoving.recipes()))
def test_every_recipe_takes_the_steps_of_an_ordinary_loop(recipe):
    models = Net(), Net()
    optimizers = [build(recipe, model, lr=1e-2) for model in models]
    optimizers[1].step_in_backward()
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6) for optimizer in optimizers]
    for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
        train(model, optimizer, range(6), scheduler=scheduler)
    assert same(*models)


@pytest.mark.parametrize("residual", [Discard(), Feedback(), Feedback(lazy=False), Fira(), Sign(), Sparse()], ids=str)
def test_gradients_accumulate_in_the_subspace(residual):
    models = Net(), Net()
    optimizers = [
        LowRankOptimizer(m.named_parameters(), 1e-2, residual=residual, codec=Int8(), refresh_every=2, transport=Keep())
        for m in models
    ]
    optimizers[0].step_in_backward(accumulate=3)
    train(models[0], optimizers[0], range(5), accumulate=3)
    # By hand: cores through absorb, dense parameters by the sum.
    model, optimizer = models[1], optimizers[1]
    for t in range(5):
        sums = {}
        for k in range(3):
            (loss_of(model, 100 * t + k) / 3).backward()
            for p, site in optimizer.sites.items():
                if site.plain:
                    sums[p] = sums[p].add_(p.grad) if p in sums else p.grad.clone()
                else:
                    optimizer.absorb(p, p.grad)
            model.zero_grad()
        for p, site in optimizer.sites.items():
            if not site.plain:
                optimizer.apply(p)
        for p, gradient in sums.items():
            p.grad = gradient
        optimizer.step()
        model.zero_grad()
    assert same(*models)


def test_no_gradient_survives_the_hook_and_full_ones_are_not_held():
    model = Net()
    optimizer = build("galore", model, lr=1e-2, rank=4)
    optimizer.step_in_backward(accumulate=2, clip=1.0)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(not gone(q) for q in model.parameters())))
    loss_of(model, 0).backward()
    assert alive == [0] * len(list(model.parameters()))
    for p, site in optimizer.sites.items():
        core = optimizer.state[p]["core"]
        assert tuple(core.shape) == site.core_shape
        assert optimizer.state[p]["window"] == 1
        if site.projected:
            assert core.numel() < p.numel()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_parameter_without_all_gradients_of_the_window_is_stepped_at_its_end(clip):
    model = Net()
    optimizer = build("comoving-adamw", model, lr=1e-2)
    optimizer.step_in_backward(accumulate=2, clip=clip)
    before = copy.deepcopy(model)
    loss_of(model, 0).backward()
    model.up.weight.sum().backward()
    by_hand = model.norm.weight
    by_hand.grad = torch.ones_like(by_hand)
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any("core" in state for state in optimizer.state.values())
    optimizer.step()  # an empty window
    optimizer.step_after_backward()
    optimizer.step_after_backward()
    loss_of(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_closure_fills_the_window():
    models = Net(), Net()
    optimizers = [build("comoving-adamw", model, lr=1e-2) for model in models]
    optimizers[1].step_in_backward()
    for model, optimizer in zip(models, optimizers, strict=True):

        def closure(model=model):
            model.zero_grad()
            loss = loss_of(model, 3)
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) > 0
    assert same(*models)


def test_tied_weights_are_stepped_once():
    models = Net(tied=True), Net(tied=True)
    optimizers = [build("comoving-adamw", m, lr=1e-2, project=["*embed*"]) for m in models]
    optimizers[1].step_in_backward()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4))
        assert optimizer.sites[model.embed.weight].projected
        assert int(optimizer.state[model.embed.weight]["step"]) == 4
    assert same(*models)


def test_experts_without_a_gradient_take_no_step():
    models = [nn.ParameterDict({"experts": nn.Parameter(torch.ones(3, 12, 16))}) for _ in range(2)]
    optimizers = [build("comoving-adamw", m, lr=1e-2, experts=["experts"]) for m in models]
    optimizers[1].step_in_backward(accumulate=2, clip=1e-3)
    for model, optimizer in zip(models, optimizers, strict=True):
        for t in range(3):
            for _ in range(2):
                g = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(t)) / 2
                g[t % 3] = 0
                if optimizer is optimizers[0]:
                    optimizer.absorb(model["experts"], 1e-3 * g)
                else:
                    (g * model["experts"]).sum().backward()
            optimizer.apply(model["experts"]) if optimizer is optimizers[0] else optimizer.step()
    assert optimizers[1].gradient_norm is not None
    steps = [
        [int(optimizer.state[m["experts"]][f"{b}.step"]) for b in range(3)]
        for m, optimizer in zip(models, optimizers, strict=True)
    ]
    assert steps[0] == steps[1] == [2, 2, 2]
    assert not torch.equal(models[1]["experts"], torch.ones(3, 12, 16))


# ------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("residual", [Discard(), Fira(), Sign(), Sparse(), Sparse(first=False)], ids=str)
def test_clipping_one_gradient_is_clipping_as_torch_does(residual):
    """With a finder that looks at this gradient alone: others see it beside the momentum before it is clipped."""
    models = Net(REAL), Net(REAL)
    options = {"residual": residual, "finder": Exact(), "refresh_every": 2, "transport": Rotate()}
    optimizers = [LowRankOptimizer(model.named_parameters(), 1e-2, **options) for model in models]
    optimizers[1].step_in_backward(clip=0.3)
    for t in range(5):
        loss_of(models[0], t).backward()
        total = nn.utils.clip_grad_norm_(models[0].parameters(), 0.3)
        optimizers[0].step()
        models[0].zero_grad()
        loss_of(models[1], t).backward()
        optimizers[1].step()
        close(*models, 1e-6)
        assert total > 0.3
        assert optimizers[1].gradient_norm == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_with_feedback_scales_the_core_and_what_is_kept(lazy, accumulate):
    """Adam on z = c F^T (g + e) with e <- c (g + e) - F z, in a frame that stays, written out."""
    shape, rank, lr, clip = (12, 20), 3, 1e-2, 4.0
    p = nn.Parameter(torch.zeros(shape, dtype=REAL))
    residual = Feedback(lazy=lazy)
    optimizer = LowRankOptimizer([p], lr, rank, residual=residual, refresh_every=100, weight_decay=0.0, scale=1.0)
    optimizer.step_in_backward(accumulate, clip=clip)
    e, w = torch.zeros(shape, dtype=REAL), torch.zeros(shape, dtype=REAL)
    m = v = 0.0
    for t in range(1, 8):
        gradients = [
            torch.randn(shape, dtype=REAL, generator=torch.Generator().manual_seed(10 * t + k)) for k in range(2)
        ]
        for g in gradients[:accumulate]:
            (p * g).sum().backward()
        optimizer.step()
        frame = optimizer.state[p]["frame.0"]
        seen = sum(gradients[:accumulate]) + e
        size = seen.norm()
        c = min(1.0, clip / (size + 1e-6))
        assert c < 1
        assert optimizer.gradient_norm == pytest.approx(float(size), rel=1e-6)
        z = c * frame.T @ seen
        e = c * seen - frame @ z
        m, v = 0.9 * m + 0.1 * z, 0.999 * v + 0.001 * z**2
        w = w - lr * frame @ (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [REAL, torch.complex128])
def test_both_ways_of_keeping_feedback_clip_alike_through_refreshes(dtype):
    weights = []
    for lazy in (True, False):
        p = nn.Parameter(torch.zeros(8, 9, 10, dtype=dtype))
        optimizer = LowRankOptimizer([p], 1e-2, 0.3, residual=Feedback(lazy=lazy), refresh_every=2)
        optimizer.step_in_backward(accumulate=2, clip=5.0)
        for t in range(14):
            g = torch.randn(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(t)).conj()
            (p * g).sum().real.backward() if dtype.is_complex else (p * g).sum().backward()
            if t % 2:
                optimizer.step()
                assert optimizer.gradient_norm > 5
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=1e-7, atol=1e-9)


def test_the_running_norm_clips_by_the_last_window():
    models = Net(REAL), Net(REAL)
    optimizers = [build("galore", model, lr=1e-2, transport=Rotate()) for model in models]
    optimizers[1].step_in_backward(clip=0.3, norm="running")
    last = 0.0
    for t in range(5):
        loss_of(models[0], t).backward()
        size = float(nn.utils.get_total_norm([p.grad for p in models[0].parameters()]))
        for p in models[0].parameters():
            p.grad *= min(1.0, 0.3 / (last + 1e-6))
        last = size
        optimizers[0].step()
        models[0].zero_grad()
        loss_of(models[1], t).backward()
        assert optimizers[1].state[models[1].up.weight]["step"] == t + 1  # inside the backward pass
        optimizers[1].step()
        assert optimizers[1].gradient_norm == pytest.approx(size, rel=1e-4)
        close(*models, 1e-6)


@pytest.mark.parametrize("norm", ["exact", "running"])
def test_a_loose_limit_changes_nothing(norm):
    models = Net(), Net()
    optimizers = [build("comoving-adamw", model, lr=1e-2) for model in models]
    optimizers[1].step_in_backward(clip=1e6, norm=norm)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(6))
    assert same(*models)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("recipe", ["comoving-adamw", "fira", "tensorgrad", "soap", "adamw"])
@pytest.mark.parametrize(("clip", "norm"), [(None, "exact"), (0.3, "exact"), (0.3, "running")])
def test_saving_in_the_middle_of_a_window_is_exact(recipe, clip, norm):
    def new():
        model = Net()
        optimizer = build(recipe, model, lr=1e-2)
        optimizer.step_in_backward(accumulate=2, clip=clip, norm=norm)
        return model, optimizer

    model, optimizer = new()
    train(model, optimizer, range(3), accumulate=2)
    loss_of(model, 1000).backward()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    other, restored = new()
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (other, restored)):
        loss_of(m, 1001).backward()
        o.step()
        train(m, o, range(5, 8), accumulate=2)
    assert same(model, other)
    assert optimizer.gradient_norm == restored.gradient_norm


# ------------------------------------------------------------------------------------------- with the rest of torch


def test_autocast_and_a_compiled_model():
    models = Net(), Net()
    optimizers = [build("comoving-adamw", model, lr=1e-2) for model in models]
    optimizers[1].step_in_backward(accumulate=2, clip=0.5)
    optimizers[0].step_in_backward(accumulate=2, clip=0.5)
    ways = models[0], torch.compile(models[1], backend="aot_eager")
    for model, optimizer in zip(ways, optimizers, strict=True):
        for t in range(4):
            for k in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss_of(model, 10 * t + k).backward()
            optimizer.step()
    assert same(*models)


def test_checkpointed_activations():
    """Without reentrance all is as ever; with it, gradients come in pieces where a weight is used twice."""
    models = Net(), Net()
    optimizers = [build("comoving-adamw", model, lr=1e-2) for model in models]
    optimizers[1].step_in_backward()
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            h = model.embed(torch.arange(24))
            inner = checkpoint(lambda h, model=model: model.down(torch.relu(model.up(h))), h, use_reentrant=False)
            inner.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(*models)
    model, optimizer = models[1], optimizers[1]
    h = model.embed(torch.arange(24))
    for _ in range(2):
        h = checkpoint(lambda h: model.down(torch.relu(model.up(h))), h, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        h.square().sum().backward()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"accumulate": 0}, ValueError, r"accumulate.*>= 1.*0"),
        ({"accumulate": 1.5}, TypeError, "accumulate"),
        ({"clip": 0.0}, ValueError, r"clip.*0"),
        ({"clip": float("nan")}, ValueError, "clip"),
        ({"norm": "max"}, ValueError, "norm.*exact.*running"),
    ],
)
def test_options_outside_their_interval(options, error, match):
    optimizer = build("comoving-adamw", Net())
    with pytest.raises(error, match=match):
        optimizer.step_in_backward(**options)
    optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="already"):
        optimizer.step_in_backward()


@pytest.mark.parametrize("options", [{"residual": MomentumBuffer()}, {"precondition": Kronecker()}], ids=str)
def test_what_cannot_be_clipped_afterwards(options):
    optimizer = LowRankOptimizer([nn.Parameter(torch.ones(12, 20))], **options)
    with pytest.raises(ValueError, match=r"clip=1.0 is refused: (residual|precondition)"):
        optimizer.step_in_backward(clip=1.0)
    optimizer.step_in_backward()


def test_gradients_that_are_there_already():
    model = Net()
    optimizer = build("comoving-adamw", model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="embed.weight.* has a gradient already"):
        optimizer.step_in_backward()
    optimizer.zero_grad()
    optimizer.step_in_backward(accumulate=2)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="window is open"):
        optimizer.step_after_backward()


def test_more_backward_passes_than_the_window_has():
    model = Net()
    optimizer = build("comoving-adamw", model)
    optimizer.step_in_backward()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="got a gradient after it was stepped"):
        loss_of(model, 1).backward()


def test_a_gradient_that_is_not_finite():
    model = Net()
    optimizer = build("comoving-adamw", model)
    optimizer.step_in_backward(clip=1.0)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="non-finite gradient in lm_head.weight: nothing was stepped"):
        loss_of(model, 0, float("nan")).backward()
    assert same(model, before)

    other = Net()
    skipping = build("comoving-adamw", other, on_nonfinite="skip")
    skipping.step_in_backward(accumulate=2)
    train(other, skipping, range(2), accumulate=2)
    (loss_of(other, 0) / 2).backward()
    loss_of(other, 1, float("inf")).backward()
    before = [p.detach().clone() for p in other.parameters()]
    skipping.step()
    assert skipping.skipped_steps == 1
    moved = [not torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True)]
    assert all(moved)  # by the gradient that was finite
    assert all(
        bool(torch.view_as_real(p).isfinite().all() if p.is_complex() else p.isfinite().all())
        for p in other.parameters()
    )
    loss_of(other, 2, float("inf")).backward()
    loss_of(other, 3, float("inf")).backward()
    before = copy.deepcopy(other)
    skipping.step()
    assert skipping.skipped_steps == 2
    assert same(other, before)


def test_a_gradient_scaler_is_refused():
    model = Net()
    optimizer = build("comoving-adamw", model)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.step_in_backward()
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler is refused.*bfloat16"):
        scaler.step(optimizer)


def test_several_processes_are_refused(monkeypatch):
    optimizer = build("comoving-adamw", Net())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="refused with 2 processes"):
        optimizer.step_in_backward()


# ------------------------------------------------------------------------------------------- what stands in p.grad


def taken(accumulate=1, clip=None, **options):
    model = Net()
    optimizer = build("comoving-adamw", model, lr=1e-2, **options)
    optimizer.step_in_backward(accumulate, clip)
    loss_of(model, 0).backward()
    return model, optimizer


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("call", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_gradients_that_were_taken_up_says_so(call, foreach):
    model, optimizer = taken(clip=0.1)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"embed.weight was taken up.*step_in_backward\(clip=...\).*gradient_norm"):
        call(model.parameters(), 0.1, foreach=foreach)
    assert same(model, before)
    optimizer.step()
    assert not same(model, before)
    assert optimizer.gradient_norm > 0.1


def test_a_hugging_face_trainer_is_told_what_to_do_and_then_trains(tmp_path):
    """As docs/backward.md has it: the steps are those of a loop."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415

    class InBackward(Trainer):
        def _get_grad_norm(self, model, grad_norm=None):
            return None

    class Scored(nn.Linear):
        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}

    def started():
        torch.manual_seed(0)
        model = Scored(16, 12)
        optimizer = build("comoving-adamw", model.named_parameters(), lr=1e-2)
        optimizer.step_in_backward(accumulate=2, clip=0.1)
        return model, optimizer

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(16, generator=generator), "labels": n % 12} for n in range(24)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.0,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1000,
        train_sampling_strategy="sequential", dataloader_pin_memory=False, average_tokens_across_devices=False,
    )  # fmt: skip

    def fit(kind):
        model, optimizer = started()
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = kind(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            trainer.train()
        return model

    with pytest.raises(RuntimeError, match=r"Trainer gets max_grad_norm=0 and a _get_grad_norm\(\) that returns None"):
        fit(Trainer)
    model, optimizer = started()
    for step in range(3):
        for part in (data[8 * step : 8 * step + 4], data[8 * step + 4 : 8 * step + 8]):
            x, y = torch.stack([row["x"] for row in part]), torch.tensor([row["labels"] for row in part])
            (model(x, y)["loss"] / 2).backward()
        optimizer.step()
    close(fit(InBackward), model, 1e-6)


@pytest.mark.parametrize(
    "read", [torch.norm, torch.abs, torch.isnan, lambda g: g + 1, lambda g: g.mul_(2), lambda g: g.sum().item()],
)  # fmt: skip
def test_nothing_can_be_read_from_it(read):
    model, _ = taken()
    with pytest.raises(RuntimeError, match=r"norm.weight was taken up inside backward\(\)"):
        read(model.norm.weight.grad)


def test_it_has_a_gradients_look_and_next_to_no_storage():
    model, _ = taken()
    for p in model.parameters():
        assert (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)
        assert p.grad.layout is torch.strided and not p.grad.requires_grad
        assert p.grad.untyped_storage().nbytes() == p.element_size()
    text = repr(model.up.weight.grad)
    assert "up.weight" in text and "(40, 16)" in text


@pytest.mark.parametrize("clear", ["optimizer", "optimizer to zero", "model", "model to zero", "nothing", "None"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_gone_before_the_next_gradient(clear, accumulate):
    """However gradients are cleared, between the passes of a window or not, training goes on as if they were None."""
    models = Net(), Net()
    optimizers = [build("comoving-adamw", model, lr=1e-2) for model in models]
    optimizers[1].step_in_backward(accumulate)
    optimizers[0].step_in_backward(accumulate)
    for t in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            for k in range(accumulate):
                loss_of(model, 10 * t + k).backward()
                assert all(isinstance(p.grad, TakenUp) for p in model.parameters())
                if optimizer is optimizers[0]:
                    continue
                if clear == "None":
                    for p in model.parameters():
                        p.grad = None
                elif clear != "nothing":
                    whose = optimizer if clear.startswith("optimizer") else model
                    whose.zero_grad(set_to_none=not clear.endswith("zero"))
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())
    assert same(*models)


def test_a_gradient_set_by_hand_takes_its_place():
    models = Net(), Net()
    for model in models:
        optimizer = build("comoving-adamw", model, lr=1e-2)
        optimizer.step_in_backward(accumulate=2)
        loss_of(model, 0).backward()
        if model is models[0]:
            model.norm.weight.grad = torch.ones(16)
        else:
            model.norm.weight.sum().backward()
        optimizer.step()
    assert same(*models)


def test_zeroing_a_list_zeroes_the_gradients_beside_it():
    """As another optimizer does, of some of the same parameters."""
    model, _ = taken(accumulate=2)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([*model.parameters(), other], 1e-2, foreach=True).zero_grad(set_to_none=False)
    assert not other.grad.any()
    assert isinstance(model.up.weight.grad, TakenUp)


def test_it_can_be_copied_saved_and_moved():
    model, optimizer = taken(accumulate=2)
    grad = model.up.weight.grad
    for other in (copy.deepcopy(grad), pickled(grad), grad.clone(), grad.detach()):
        assert isinstance(other, TakenUp) and other.shape == grad.shape
        with pytest.raises(RuntimeError, match="up.weight was taken up"):
            other.sum()
    assert grad.to(torch.float64).dtype is torch.float64
    model.up.double()
    with pytest.raises(ValueError, match="is torch.float64 of shape .* and was torch.float32"):
        optimizer.step()


def test_ordinary_stepping_comes_back_without_it():
    model, optimizer = taken()
    optimizer.step()
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.step_after_backward()
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, 2).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    model, optimizer = taken()
    optimizer.step_after_backward()  # all were stepped already, inside the backward pass
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------- copies, and other groups


def pickled(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(("clip", "norm"), [(None, "exact"), (0.3, "exact"), (0.3, "running")])
def test_a_copy_steps_in_the_backward_pass_too(copied, clip, norm):
    model = Net()
    optimizer = build("comoving-adamw", model, lr=1e-2)
    optimizer.step_in_backward(accumulate=2, clip=clip, norm=norm)
    train(model, optimizer, range(2), accumulate=2)
    loss_of(model, 1000).backward()
    other, twin = copied((model, optimizer))
    before = copy.deepcopy(model)
    for m, o in ((model, optimizer), (other, twin)):
        loss_of(m, 1001).backward()
        assert all(gone(p) for p in m.parameters())
        o.step()
        train(m, o, range(5, 7), accumulate=2)
    assert same(model, other) and not same(model, before)
    assert optimizer.gradient_norm == twin.gradient_norm


def test_parameters_that_join_are_stepped_in_the_backward_pass():
    models = Net(), Net()
    late = {id(p) for m in models for p in m.up.parameters()}
    for model, inside in zip(models, (False, True), strict=True):
        optimizer = LowRankOptimizer([p for p in model.parameters() if id(p) not in late], 1e-2)
        if inside:
            optimizer.step_in_backward()
        optimizer.add_param_group({"params": list(model.up.parameters())})
        for t in range(3):
            loss_of(model, t).backward()
            assert gone(model.up.weight) == inside
            optimizer.step()
            optimizer.zero_grad()
    close(*models, 1e-5)  # where alike ones are stepped together, sums are in another order


def test_a_group_that_cannot_be_clipped_does_not_join():
    model = Net()
    optimizer = LowRankOptimizer(model.down.parameters(), 1e-2)
    optimizer.step_in_backward(clip=1.0)
    with pytest.raises(ValueError, match="adds gradients to a momentum"):
        optimizer.add_param_group({"params": list(model.up.parameters()), "residual": MomentumBuffer()})
    assert len(optimizer.param_groups) == 1


def saved_in_a_window():
    model = Net()
    optimizer = build("comoving-adamw", model, lr=1e-2)
    optimizer.step_in_backward(accumulate=2)
    loss_of(model, 0).backward()
    return model.state_dict(), optimizer.state_dict()


def test_an_open_window_is_not_forgotten_by_an_optimizer_that_steps_after_the_backward_pass():
    weights, state = saved_in_a_window()
    model = Net()
    model.load_state_dict(weights)
    optimizer = build("comoving-adamw", model, lr=1e-2)
    optimizer.load_state_dict(state)
    loss_of(model, 1).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="in the middle of a window"):
        optimizer.step()
    assert same(model, before)
    optimizer.zero_grad()
    optimizer.step_in_backward(accumulate=2)
    loss_of(model, 1).backward()
    optimizer.step()
    assert not same(model, before)


def test_a_window_that_began_without_a_limit_cannot_be_clipped():
    weights, state = saved_in_a_window()
    model = Net()
    model.load_state_dict(weights)
    optimizer = build("comoving-adamw", model, lr=1e-2)
    optimizer.step_in_backward(accumulate=2, clip=1.0)
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="began without clip"):
        optimizer.step()


def test_a_norm_that_overflows_does_not_stop_the_windows_after_it():
    p = nn.Parameter(torch.ones(4))
    optimizer = LowRankOptimizer([p], 1e-2)
    optimizer.step_in_backward(clip=1.0, norm="running")
    for size in (3e38, 1.0, 1.0):
        (p * size).sum().backward()
        optimizer.step()
    assert optimizer.gradient_norm == pytest.approx(2.0)


def by_the_running_norm(model, **options):
    optimizer = build("comoving-adamw", model, lr=1e-2, **options)
    optimizer.step_in_backward(clip=0.1, norm="running")
    return optimizer


def test_what_is_fed_back_is_clipped_by_the_running_norm_too():
    """Otherwise the feedback of an unclipped gradient, beside gradients that are clipped by it, raises every norm."""
    p = nn.Parameter(torch.zeros(24, 20))
    optimizer = LowRankOptimizer([p], 1e-2, 2, residual=Feedback())
    optimizer.step_in_backward(clip=0.1, norm="running")
    norms = []
    for t in range(10):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        (p * g / g.norm() * (1000 if t == 3 else 1)).sum().backward()
        optimizer.step()
        norms.append(optimizer.gradient_norm)
    assert norms[0] == pytest.approx(1.0) and norms[3] > 900
    assert max(norms[1:3] + norms[5:]) < 1.5, norms


def test_a_running_norm_does_not_fall_where_gradients_are_dropped():
    model = Net()
    optimizer = by_the_running_norm(model, on_nonfinite="skip")
    loss_of(model, 0).backward()
    optimizer.step()
    norm = optimizer.gradient_norm
    loss_of(model, 1, float("nan")).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    before = model.norm.weight.detach().clone()
    loss_of(model, 2).backward()
    assert optimizer.param_groups[0]["gradient_norm"] == norm
    assert not torch.equal(model.norm.weight, before)


def test_going_back_to_a_checkpoint_before_the_first_norm():
    model = Net()
    optimizer = by_the_running_norm(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3))
    first = copy.deepcopy(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(3))
    assert same(model, first)


def test_two_optimizers_cannot_take_up_one_gradient():
    model = Net()
    for _ in range(2):
        build("comoving-adamw", model, lr=1e-2).step_in_backward()
    with pytest.raises(RuntimeError, match="another optimizer"):
        loss_of(model, 0).backward()
