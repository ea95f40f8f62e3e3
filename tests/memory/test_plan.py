"""The plan against what is allocated for real: state to the byte, the peak of every kind of step within 10%."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import comoving
from comoving.cadence import Every, Growing
from comoving.codecs import Int4
from comoving.memory import measure
from comoving.memory.plan import STATE
from comoving.weights import quantize

NEVER = 10**6
# What these do now and then they shall do every second step here, which keeps the test short.
OFTEN = {
    "coap": {"finder": "correlation(recalibrate=2)"},
    "soap": {"rule": "soap(every=2)"},
    "low-rank-soap": {"rule": "soap(one_sided=True, every=2)"},
    "shampoo": {"rule": "shampoo(every=2)"},
    "shampoo-tucker": {"precondition": "kronecker(every=2)"},
}
EIGHT, FOUR = {"moments": "int8", "codec": "int8"}, {"moments": "int4", "codec": "int4"}
BLOCKWISE = ("galore", "comoving-adamw", "muon", "soap")
CASES = [(recipe, {}) for recipe in comoving.recipes()]
CASES += [(recipe, EIGHT) for recipe in BLOCKWISE] + [(recipe, FOUR) for recipe in ("comoving-adamw",)]


class Small(nn.Module):
    """Two equal matrices, a bias, an embedding that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.first = nn.Linear(40, 64)
        self.second = nn.Linear(40, 64, bias=False)


class Tensors(nn.Module):
    """Complex weights of order four and a real matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(12, 10, 9, 8, dtype=torch.complex64))
        self.last = nn.Linear(24, 32)


def there(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Weights, gradients and state, none of which a list keeps alive when the step replaces it."""
    yield from model.parameters()
    yield from (p.grad for p in model.parameters() if p.grad is not None)
    for state in optimizer.state.values():
        for value in state.values():
            inner = value.values() if isinstance(value, dict) else [value]
            yield from (x for x in inner if isinstance(x, Tensor))


def step(model: nn.Module, optimizer: comoving.LowRankOptimizer, every: int, device: str = "cpu") -> int:
    """The measured peak of a step with a refresh of everything, or of nothing."""
    for group in optimizer.param_groups:
        group["refresh_every"] = every
    for state in optimizer.state.values():
        if "cadence.next" in state:
            state["cadence.next"].fill_(0 if every == 1 else NEVER)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return measure(optimizer.step, there(model, optimizer), device).peak


def full_rank(recipe: str) -> bool:
    return comoving.recipes()[recipe].full_rank


def check(module: nn.Module, recipe: str, options: dict[str, str], device: str = "cpu") -> None:
    torch.manual_seed(0)
    options = {k: v for k, v in options.items() if k in {"moments", "rounding"} or not full_rank(recipe)}
    options |= OFTEN.get(recipe, {})
    plan = comoving.plan(module, recipe, 0.25, device=device, **options)
    optimizer = comoving.build(recipe, module, 1e-3, 0.25, **options)
    # Phases far ahead: otherwise a parameter with the phase of the moment would refresh in a plain step.
    for p, site in optimizer.sites.items():
        optimizer.sites[p] = replace(site, phase=NEVER - 1)
    first = step(module, optimizer, 1, device)
    plain = max(step(module, optimizer, NEVER, device) for _ in range(1 + (recipe in OFTEN)))
    refresh = max(step(module, optimizer, 1, device) for _ in range(1 + (recipe in OFTEN)))
    gradients = sum(p.numel() * p.element_size() for p in module.parameters())
    assert plan.gradients == gradients
    stored = {x.untyped_storage().data_ptr() for x in [*there(module, optimizer)][2 * len(optimizer.sites) :]}
    own = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in (*module.parameters(), *module.buffers())}
    weights = sum(storage.nbytes() for place, storage in own.items() if place not in stored)
    assert plan.weights == weights
    assert plan.state_bytes == comoving.state_bytes(optimizer)
    measured = measure(lambda: None, [*there(module, optimizer), *module.buffers()]).before if device == "cpu" else None
    assert measured is None or weights + gradients + plan.state_bytes == pytest.approx(measured, rel=0.02)
    resident = weights + gradients + plan.state_bytes
    assert resident + plan.step_temporaries == pytest.approx(plain, rel=0.1)
    assert resident + plan.refresh_temporaries == pytest.approx(max(first, refresh), rel=0.1)
    assert plan.peak_bytes == pytest.approx(max(first, plain, refresh), rel=0.1)


@pytest.mark.parametrize(("recipe", "options"), CASES, ids=lambda x: "+".join(x.values()) if isinstance(x, dict) else x)
def test_plan_of_matrices_agrees_with_what_is_allocated(recipe: str, options: dict[str, str]) -> None:
    check(Small(), recipe, options)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("comoving-adamw", EIGHT), ("tensor-galore", {}), ("tt-ice-adam", {})],
)
def test_plan_of_tensors_agrees_with_what_is_allocated(recipe: str, options: dict[str, str]) -> None:
    check(Tensors(), recipe, options)


def half(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def in_codes(model: nn.Module) -> nn.Module:
    return quantize(model, skip=["second"])


def deferring(model: nn.Module) -> nn.Module:
    return quantize(model, Int4(), compensate=1)


DRAWN = {"codec": "int8(rounding='stochastic')", "moments": "int8(rounding='stochastic')"}
AUTO = {"budget": "30%", "codec": "auto", "moments": "auto"}  # two equal matrices get codecs that differ


@pytest.mark.parametrize(
    ("made", "recipe", "options"),
    [
        (half, "comoving-adamw", {"rounding": "stochastic", **DRAWN}),
        (half, "adamw", {"rounding": "stochastic"}),
        (nn.Module.float, "comoving-adamw", {"bases": "int4(rounding='stochastic')"}),
        (nn.Module.float, "comoving-adamw", AUTO),
        (in_codes, "comoving-adamw", {}),
        (in_codes, "adamw", {}),
        (deferring, "loqt", {}),
        (deferring, "loqt", {"bases": "int8"}),
    ],
)
def test_plans_of_weights_and_state_in_few_bits(made, recipe: str, options: dict[str, str]) -> None:
    check(made(Small()), recipe, options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("recipe", ["adamw", "galore", "comoving-adamw", "muon"])
def test_plan_agrees_with_the_allocator_of_cuda(recipe: str) -> None:
    model = nn.Sequential(*(nn.Linear(1536, 4096, bias=False) for _ in range(4))).cuda()
    step(model, comoving.build(recipe, model, 0.0, 0.25), 1, "cuda")  # libraries' workspaces, allocated once
    torch.cuda.empty_cache()
    options: dict[str, str] = {}
    check(model, recipe, options, "cuda")


def test_blocks_are_planned_one_by_one() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 24, 40))
    plan = comoving.plan(model, "comoving-adamw", 6, device="cpu", experts=("experts",))
    optimizer = comoving.build("comoving-adamw", model, 1e-3, 6, experts=("experts",))
    step(model, optimizer, 1)
    assert plan.state_bytes == comoving.state_bytes(optimizer)


def test_a_plan_says_the_rank_that_is_built() -> None:
    assert comoving.plan(Small(), "comoving-adamw").rank == 0.25
    assert comoving.plan(Small(), "apollo-mini").rank == comoving.recipes()["apollo-mini"].rank == 1
    assert comoving.plan(Small(), "muon", 0.125).rank is None


def test_parts_of_the_state_by_hand() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.empty(16, 48))
    plan = comoving.plan(model, "comoving-adamw", 4, device="cpu", moments="full")
    # A whole gradient and a core of 4 x 48 in int8, each with a float32 step a row, of the first row blocks of 48.
    feedback = 16 * 48 + 16 * 4 + 4 * 48 + 4 * 4 + 4
    assert dict(plan.state) == {
        "moments": 2 * 4 * 48 * 4,
        "frames": 16 * 4 * 4,
        "feedback": feedback,
        "finder": 0,
        "preconditioner": 0,
        "scalars": 4 + 6 * 4,
    }
    assert set(plan.state) == set(STATE)
    assert plan.projected == plan.parameters == 16 * 48
    assert sum(plan.parts().values()) == plan.peak_bytes


def test_layerwise_counts_the_largest_gradient() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    whole, layerwise = (comoving.plan(model, "galore", 4, layerwise=flag) for flag in (False, True))
    assert whole.gradients == (2 * 24 * 40 + 40 + 24) * 4
    assert layerwise.gradients == 24 * 40 * 4
    assert layerwise.state_bytes == whole.state_bytes


def test_skipping_steps_is_planned_with_its_copies() -> None:
    model = Small()
    plan = comoving.plan(model, "comoving-adamw", 0.25, device="cpu", on_nonfinite="skip")
    optimizer = comoving.build("comoving-adamw", model, 1e-3, 0.25, on_nonfinite="skip")
    peaks = [step(model, optimizer, 1) for _ in range(3)]
    assert plan.peak_bytes == pytest.approx(max(peaks), rel=0.1)


def test_frozen_parameters_weigh_but_have_neither_gradient_nor_state() -> None:
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False))
    model[0].weight.requires_grad_(False)
    plan = comoving.plan(model, "adamw")
    assert (plan.weights, plan.gradients, plan.state_bytes) == (2 * 24 * 40 * 4, 24 * 40 * 4, 2 * 24 * 40 * 4 + 4)


def test_fsdp_shares_what_has_rows() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(48, 16, bias=False), nn.Linear(16, 48, bias=False)])})
    alone, shared = (comoving.plan(model, "galore", 4, fsdp=n) for n in (1, 5))
    assert (shared.weights, shared.gradients) == (4 * (4 * 48 + 10 * 16),) * 2  # of 16 rows 4, of 48 rows 10
    # Alone the first has its frame on the rows: core 4 x 48; the second on the columns: core 48 x 4.
    assert alone.state["moments"] == 2 * 4 * (4 * 48 + 48 * 4)
    # Sharded both have it on the columns, which are not cut, and whole on every rank.
    assert shared.state["moments"] == 2 * 4 * (4 * 4 + 10 * 4)
    assert shared.state["frames"] == 4 * (48 * 4 + 16 * 4)
    assert alone.wire == {}
    assert shared.communication == 4 * 4 * 48 * 16
    assert alone.communication == 0


def test_ddp_holds_a_copy_of_all_gradients_in_buckets() -> None:
    plan = comoving.plan(nn.Linear(24, 40), "adamw", ddp=2)
    assert plan.communication == plan.gradients == (24 * 40 + 40) * 4


def test_activations_are_an_estimate_by_formula() -> None:
    plain = comoving.plan("llama-60m", "adamw", dtype="bfloat16", batch=2, sequence=64)
    layer = 6 * 512 + 2 * 512 + 4 * 1376
    assert plain.activations == 128 * (8 * layer * 2 + 32000 * 6)
    fewer = comoving.plan("llama-60m", "adamw", dtype="bfloat16", batch=2, sequence=64, checkpointing=True)
    assert fewer.activations == 128 * ((8 * 512 + layer) * 2 + 32000 * 6)
    assert comoving.plan("llama-60m", "adamw").activations is None
    with pytest.raises(ValueError, match="need sequence"):
        comoving.plan("llama-60m", "adamw", batch=2)


def test_the_model_is_left_alone() -> None:
    model = Small()
    before = [p.clone() for p in model.parameters()]
    comoving.plan(model, "comoving-adamw", 0.25)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))


def test_a_cadence_changes_how_often_frames_are_refreshed_and_not_what_a_refresh_needs() -> None:
    every, growing = (comoving.plan(Small(), "galore", 4, cadence=cadence) for cadence in (Every(), Growing()))
    for name in ("step_temporaries", "refresh_temporaries", "step_flops", "refresh_flops"):
        assert getattr(growing, name) == pytest.approx(getattr(every, name), rel=1e-3), name
    assert growing.refresh_flops > growing.step_flops > 0
    matrices = growing.state["scalars"] - every.state["scalars"]
    assert matrices % 16 == 0 and matrices > 0  # two integers a projected parameter


def test_operations_of_a_step_by_hand() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.empty(64, 4096))
    plan = comoving.plan(model, "galore", 8)
    products = 2 * (2 * 64 * 8 * 4096)  # project and lift
    assert products < plan.step_flops < 1.5 * products
    gram = 2 * 4096 * 64**2 + 9 * 64**3  # the square of a wide gradient, and its eigenvectors
    assert gram < plan.refresh_flops < 1.2 * gram


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ddp": 2, "fsdp": 2}, "two ways"),
        ({"ddp": 0}, "ddp must be"),
        ({"batch": 0}, "batch must be"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device"),
        ({"recipe": "adamm"}, "unknown recipe"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comoving.plan(nn.Linear(4, 4), **arguments)  # type: ignore[arg-type]


def test_unknown_options_and_models_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="momentums"):
        comoving.plan(nn.Linear(4, 4), momentums="int8")
    with pytest.raises(TypeError, match="not int"):
        comoving.plan(3)
