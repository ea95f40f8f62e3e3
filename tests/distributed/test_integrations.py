"""The examples of docs/examples, which users copy, train in two processes as a plain loop does in one."""

import contextlib
import importlib.util
import io
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DistributedSampler

import comoving
from distributed.processes import run

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"with_{name}", EXAMPLES / f"with_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(recipe):
    """An optimizer for a model, by its name; "torch" is torch's AdamW."""
    if recipe == "torch":
        return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2)
    # The side is that which sharded parameters leave whole.
    options = {"side": "right"} | ({"scale": "auto"} if recipe == "comoving-adamw" else {})
    return lambda model: comoving.build(recipe, model.named_parameters(), lr=1e-2, rank=0.25, **options)


def data_of(name):
    generator = torch.Generator().manual_seed(0)
    if name == "trainer":
        return torch.randint(32, (32, 16), generator=generator)
    return list(zip(*torch.randint(32, (2, 32), generator=generator), strict=True))


def on_cpu(module):
    """As on GPUs, but that accelerate knows FSDP there only."""
    import accelerate  # noqa: PLC0415
    from accelerate.state import PartialState  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    class OnCPU(accelerate.Accelerator):
        def __init__(self, cpu=True, fsdp_plugin=None, **options):
            super().__init__(cpu=cpu, fsdp_plugin=fsdp_plugin, **options)
            kind = DistributedType.MULTI_CPU if fsdp_plugin is None else DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = kind  # from which every other state is made
            if fsdp_plugin is not None:
                self.state.distributed_type, self.state.fsdp_plugin = kind, fsdp_plugin

    module.Accelerator = OnCPU


def fitted(name, how, recipe):
    """The model after one pass."""
    module = example(name)
    torch.manual_seed(0)
    model = module.small() if name == "trainer" else module.Model()
    if name == "accelerate":
        on_cpu(module)
        return module.train(model, data_of(name), how, built(recipe))
    if name == "lightning":
        quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        return module.train(model, data_of(name), how, built(recipe), **quiet)
    import transformers.trainer  # noqa: PLC0415

    on_cpu(transformers.trainer)

    class Trained(module.ComovingTrainer):
        build = staticmethod(built(recipe))

    quiet = {"use_cpu": True, "ddp_backend": "gloo", "disable_tqdm": True, "dataloader_pin_memory": False}
    return module.train(model, data_of(name), how, Trained, **quiet)


def _fitted(rank):
    """Of each case the weights of this process and those of a plain loop; or what was raised."""
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    warnings.simplefilter("ignore")  # of the trainers, about this machine
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "MASTER_PORT": "29500"}
    found = {}
    for name, how, recipe in CASES:
        AcceleratorState._reset_state()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                model = fitted(name, how, recipe)
            except ValueError as error:  # by both processes
                found[name, how, recipe] = str(error)
                continue
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        weights = list(model.parameters())
        assert all(hasattr(p, "full_tensor") == (how == "fsdp") for p in weights)
        weights = [p.full_tensor() if how == "fsdp" else p.detach() for p in weights]
        found[name, how, recipe] = weights, plain_loop(name, recipe)
    return found


def order(name):
    """Which rows are in the batches of both processes; Lightning shuffles them."""
    if name != "lightning":
        return [range(8 * step, 8 * step + 8) for step in range(4)]
    own = [list(DistributedSampler(range(32), 2, rank)) for rank in range(2)]
    return [own[0][4 * step : 4 * step + 4] + own[1][4 * step : 4 * step + 4] for step in range(4)]


def plain_loop(name, recipe):
    """One process, batches of eight."""
    module = example(name)
    torch.manual_seed(0)
    model = module.small() if name == "trainer" else module.Model()
    optimizer, data = built(recipe)(model), data_of(name)
    final = 0.0 if name == "trainer" else 0.1
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final, 4)
    for rows in order(name):
        optimizer.zero_grad()
        if name == "trainer":
            model(input_ids=data[rows], labels=data[rows]).loss.backward()
        else:
            model(*(torch.stack(column) for column in zip(*(data[i] for i in rows), strict=True))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return [p.detach() for p in model.parameters()]


NAMES = ("accelerate", "trainer", "lightning")
CASES = [
    (name, *case)
    for name in NAMES
    for case in [("ddp", "comoving-adamw"), ("fsdp", "adamw"), ("fsdp", "comoving-adamw")]
]


def test_two_processes_train_as_a_plain_loop_does():
    """One test for all cases: the time goes into imports."""
    for package in ("accelerate", "transformers", "lightning"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    first, second = run(2, _fitted)
    for case in CASES:
        (own, plain), (other, _) = first[case], second[case]
        for a, b, wanted in zip(own, other, plain, strict=True):
            assert torch.equal(a, b), case
            # Where a gradient is next to zero its last digit is a direction of Adam's.
            torch.testing.assert_close(a, wanted, rtol=0, atol=2e-3, msg=lambda text, case=case: f"{case}: {text}")


def _resumed(rank, folder, how, recipe):
    """The weights after six steps, and after three, a checkpoint, and three more of another start."""
    warnings.simplefilter("ignore")
    module = example("accelerate")
    on_cpu(module)

    def begun(seed):
        torch.manual_seed(seed)
        model, sharded = module.Model(), None
        if how == "fsdp":
            sharded = module.FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
            )
        accelerator = module.Accelerator(fsdp_plugin=sharded)
        return accelerator, *accelerator.prepare(model, built(recipe)(model))

    def stepped(accelerator, model, optimizer):
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            x = torch.randint(32, (4,), generator=generator)
            optimizer.zero_grad()
            accelerator.backward(model(x, x))
            optimizer.step()
        return [p.full_tensor() if how == "fsdp" else p.detach().clone() for p in model.parameters()]

    first = begun(0)
    stepped(*first)
    first[0].save_state(folder)
    expected, second = stepped(*first), begun(1)
    second[0].load_state(folder)
    return expected, stepped(*second)


@pytest.mark.parametrize(
    ("how", "recipe"),
    [("ddp", "comoving-adamw"), pytest.param("fsdp", "adamw", marks=pytest.mark.full), ("fsdp", "comoving-adamw")],
)
def test_accelerate_resumes_from_its_checkpoint(tmp_path, how, recipe):
    pytest.importorskip("accelerate")
    for expected, found in run(2, _resumed, str(tmp_path / "state"), how, recipe):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
