"""State: its size, to the byte, and its dtypes."""

import gc

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import comoving
from comoving import LowRankOptimizer, build, explain, recipes, state_bytes
from comoving.codecs import BFloat16, Full, Int8
from comoving.residual import Feedback
from comoving.transport import Carry

F32 = 4
DIAGNOSTICS = 6 * 4
STEP = F32
CARRY = F32  # the bound K


def model_of(**shapes):
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    return model


def mixed(dtype=torch.float32):
    return model_of(
        wide=((24, 40), dtype), tall=((48, 16), dtype), tensor=((12, 10, 9), dtype), bias=((7,), dtype),
        spectral=((16, 12, 9), torch.complex64), modes=((5,), torch.complex64),
    )  # fmt: skip


def step(model, optimizer, count=1):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def tensors(optimizer):
    return [(p, n, x) for p, s in optimizer.state.items() for n, x in s.items() if isinstance(x, torch.Tensor)]


def live_storages():
    """Address -> bytes of every storage that a live Python tensor holds; a compiler's stand-ins hold none."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in {torch.Tensor, nn.Parameter} and x.device.type == "cpu"]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive if x.numel()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*recipes(), "galore+ef"])
def test_state_bytes_is_what_the_allocator_gets_back(recipe, dtype):
    model = mixed(dtype)
    optimizer = build(recipe, model, 1e-3)
    gc.collect()  # what other tests left behind is not ours to give back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(model, optimizer, 2)
        claimed = state_bytes(optimizer)
        with record_function("release"):
            optimizer.state.clear()
            gc.collect()
    (release,) = [event for event in record.events() if event.name == "release"]
    assert -release.cpu_memory_usage == claimed > 0


@pytest.mark.parametrize("recipe", recipes())
def test_state_bytes_is_the_growth_of_live_storages(recipe):
    model = mixed()
    optimizer = build(recipe, model, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = live_storages()
    optimizer.step()
    after = live_storages()
    grown = {address: size for address, size in after.items() if before.get(address) != size}
    # What the step leaves outside the state are at most a few scalars.
    outside = grown.keys() - {x.untyped_storage().data_ptr() for _, _, x in tensors(optimizer)}
    assert sum(grown[a] for a in outside) <= 16 * len(optimizer.sites)
    assert sum(grown.values()) - sum(grown[a] for a in outside) == state_bytes(optimizer)


@pytest.mark.parametrize("recipe", [*recipes(), "tensor-galore+ef"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_table_promises_what_the_state_weighs(recipe, dtype):
    model = mixed(dtype)
    optimizer = build(recipe, model, 1e-3)
    promised = explain(optimizer).state_bytes
    for _ in range(3):
        step(model, optimizer, 3)
        assert state_bytes(optimizer) == promised == explain(optimizer).state_bytes
    rows = {row.parameter: row.bytes for row in explain(optimizer).rows}
    for p, site in optimizer.sites.items():
        assert rows[site.name] == sum(
            x.untyped_storage().nbytes() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)
        )


@pytest.mark.parametrize("recipe", [*recipes(), "galore+ef"])
def test_no_tensor_of_the_state_keeps_a_larger_storage_alive(recipe):
    model = mixed()
    optimizer = build(recipe, model, 1e-3)
    step(model, optimizer, 9)
    every = tensors(optimizer)
    for _, name, x in every:
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), name
    assert len({x.untyped_storage().data_ptr() for _, _, x in every}) == len(every)


def test_shared_storages_count_once():
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = torch.optim.SGD([p], 0.1)
    buffer = torch.zeros(10, 4)
    optimizer.state[p] = {"a": buffer[:6], "b": buffer[4:], "c": torch.zeros(3), "d": 7}
    assert state_bytes(optimizer) == 10 * 4 * F32 + 3 * F32
    assert state_bytes(optimizer, projected=True) == 0


def test_torchs_adamw_is_measured_too():
    model = nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    assert state_bytes(optimizer) == 2 * F32 * 35 + 2 * STEP


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("diagnostics", [True, False])
@pytest.mark.parametrize("recipe", ["galore", "ldadam", "galore+ef"])
def test_numbers_of_galore_and_ldadam(recipe, shape, diagnostics):
    rank, (m, n) = 8, sorted(shape)
    model = model_of(weight=(shape, torch.float32))
    optimizer = build(recipe, model, 1e-3, rank=rank, diagnostics=diagnostics)
    step(model, optimizer, 4)
    numbers = m * rank + 2 * n * rank + (0 if recipe == "galore" else m * n + 1)
    numbers += n * rank * (recipe == "galore+ef")  # what the window has used, which saves a product a step
    assert state_bytes(optimizer) == F32 * numbers + STEP + DIAGNOSTICS * diagnostics


@pytest.mark.parametrize(
    ("codec", "buffer"), [(Full(), 4 * 1280), (BFloat16(), 2 * 1280), (Int8(block=20), 1280 + (48 + 16) * 4)]
)
def test_numbers_of_carry_with_each_codec(codec, buffer):
    model = model_of(weight=((24, 40), torch.float32))
    optimizer = comoving.AdamW(model.parameters(), rank=8, codec=codec, moments=Full(), transport=Carry())
    step(model, optimizer, 4)
    frame, moments, mass = 24 * 8, 2 * 8 * 40, 8
    assert state_bytes(optimizer) == F32 * (frame + moments + mass) + CARRY + buffer + F32 + STEP + DIAGNOSTICS


def test_complex_second_moments_are_real():
    model = model_of(spectral=((16, 12, 9), torch.complex64), modes=((15,), torch.complex64))
    for recipe in ("adamw", "galore", "ldadam", "tensor-galore", "tucker-adam", "tt-adam", "ht-adam"):
        optimizer = build(recipe, model, 1e-3)
        step(model, optimizer, 2)
        for p in model.parameters():
            first, second = optimizer.state[p]["moment.first"], optimizer.state[p]["moment.second"]
            assert first.dtype == torch.complex64 and second.dtype == torch.float32
            assert first.shape == second.shape
    dense = build("adamw", model, 1e-3)
    step(model, dense)
    assert state_bytes(dense) == (8 + 4) * (16 * 12 * 9 + 15) + 2 * STEP


@pytest.mark.parametrize("recipe", ["galore", "ldadam", "comoving-adamw"])
def test_projected_counts_projected_parameters_only(recipe):
    model = mixed()
    optimizer = build(recipe, model, 1e-3)
    step(model, optimizer, 2)
    dense = [(p, x) for p, _, x in tensors(optimizer) if not optimizer.sites[p].projected]
    assert {optimizer.sites[p].name for p, _ in dense} == {"bias", "modes"}
    rest = sum(x.numel() * x.element_size() for _, x in dense)
    assert state_bytes(optimizer, projected=True) == state_bytes(optimizer) - rest
    assert state_bytes(build("adamw", model), projected=True) == 0


@pytest.mark.parametrize("residual", [None, Feedback()])
def test_working_precision_of_half_precision_parameters(residual):
    extra = {} if residual is None else {"residual": residual}
    p = nn.Parameter(torch.randn(24, 40).bfloat16())
    optimizer = LowRankOptimizer([p], 1e-3, 8, **extra)
    p.grad = torch.randn(24, 40).bfloat16()
    optimizer.step()
    assert {x.dtype for _, _, x in tensors(optimizer)} == {torch.float32}


@pytest.mark.parametrize("recipe", recipes())
def test_what_is_stored_lies_in_rows(recipe):
    """Torch sends whole states to other processes as they lie in memory."""
    model = mixed(torch.float64)
    options = {} if recipe in {"adamw", "comoving"} else {"refresh_every": 2}
    optimizer = build(recipe, model, 1e-2, **options)
    step(model, optimizer, 5)
    strided = {
        f"{optimizer.sites[p].name}.{name}"
        for p, state in optimizer.state.items()
        for name, x in state.items()
        if isinstance(x, torch.Tensor) and not (x.is_contiguous() or optimizer.sites[p].plain)
    }
    assert not strided
