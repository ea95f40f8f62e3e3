"""Other people's optimizers: a few real steps each, on the weights they can take."""

import warnings

import pytest
import torch
from torch import nn

import comoving
from comoving.race import contenders
from comoving.race.contenders import Refused, hidden_weights, state_bytes, storage_bytes, tensors_in


class Net(nn.Module):
    """An embedding, two hidden matrices, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.up = nn.Linear(16, 64)
        self.norm = nn.LayerNorm(64)
        self.down = nn.Linear(64, 16)
        self.lm_head = nn.Linear(16, 10, bias=False)

    def forward(self, x):
        return self.lm_head(self.down(self.norm(self.up(self.embed(x)))))


class Spectral(nn.Module):
    """A complex weight of order four and a real bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 6, 5, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return torch.einsum("bixy,ioxy->boxy", x, self.weight).abs() + self.bias[:, None, None]


def steps(model, optimizer, x, count=3):
    losses = []
    for _ in range(count):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_hidden_weights_leave_embedding_norm_and_head_out():
    assert list(hidden_weights(Net())) == ["up.weight", "down.weight"]
    assert list(hidden_weights(Spectral())) == ["weight"]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torch-adamw", "torch"),
        ("torch-muon", "torch"),
        ("galore-torch", "galore_torch"),
        ("apollo-torch", "apollo_torch"),
        ("torchao-adamw8bit", "torchao"),
        ("pytorch-optimizer-soap", "pytorch_optimizer"),
    ],
)
def test_matrix_contender_learns(name, package):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these packages warn about themselves and about each other when imported
        pytest.importorskip(package)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Net()
            optimizer = contenders.parse(name).build(model, 1e-2, 4, 0.0)
            with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for half a minute
                losses = steps(model, optimizer, torch.arange(10), 6)
    assert losses[-1] < losses[0]
    dense = 2 * sum(p.numel() for p in model.parameters()) * 4
    total = state_bytes(optimizer)
    assert total > 0
    if name in ("galore-torch", "apollo-torch", "torch-muon"):
        assert total < dense
    if name == "torch-adamw":
        assert total == dense + 4 * len(list(model.parameters()))
        assert state_bytes(optimizer, hidden_weights(model).values()) == 2 * 4 * 2 * 16 * 64 + 8


def test_tensor_galore_of_neuraloperator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("neuralop")
        model = Spectral()
        contender = contenders.parse("neuralop-tensor-galore")
        optimizer = contender.build(model, 1e-2, 0.25, 0.0)
        losses = steps(model, optimizer, torch.randn(2, 4, 6, 5, dtype=torch.complex64))
    assert losses[-1] < losses[0]
    assert 0 < state_bytes(optimizer, [model.weight]) < 2 * 8 * model.weight.numel()
    assert "first gradient" in contender.note
    with pytest.raises(Refused, match="matrices"):
        contender.build(Net(), 1e-2, 0.25, 0.0)


@pytest.mark.parametrize(
    ("name", "package", "word"),
    [
        ("torch-muon", "torch", "real matrices"),
        ("galore-torch", "galore_torch", "real matrices"),
        ("apollo-torch", "apollo_torch", "real matrices"),
        ("torchao-adamw8bit", "torchao", "imaginary"),
        ("pytorch-optimizer-soap", "pytorch_optimizer", "complex"),
    ],
)
def test_complex_tensors_are_refused_with_the_reason(name, package, word):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package)
        with pytest.raises(Refused, match=word):
            contenders.parse(name).build(Spectral(), 1e-2, 0.25, 0.0)


def test_missing_package_is_a_refusal_that_names_the_extra(monkeypatch):
    def missing(module, extra):
        raise ImportError(f'not installed: pip install "comoving[{extra}]"')

    monkeypatch.setattr(contenders, "require", missing)
    with pytest.raises(Refused, match=r"comoving\[bench\]"):
        contenders.parse("galore-torch").build(Net(), 1e-2, 4, 0.0)


def test_matrix_rank():
    matrix = torch.empty(64, 16)
    assert contenders.matrix_rank(0.25, matrix) == 4
    assert contenders.matrix_rank(40, matrix) == 16
    with pytest.raises(Refused, match="one rank"):
        contenders.matrix_rank((2, 2), matrix)


def test_bytes_are_storages_once_each_wherever_they_hide():
    base = torch.zeros(100)

    class Projector:
        def __init__(self):
            self.basis = base[:10]
            self.again = [base[5:], {"deep": torch.zeros(3, dtype=torch.complex64)}]
            self.me = self

    assert storage_bytes(tensors_in({"projector": Projector()})) == 400 + 24
    assert storage_bytes(tensors_in([1, "x", None])) == 0


def test_our_contender_steps_and_is_counted():
    model = Net()
    optimizer = contenders.parse("comoving-adamw").build(model, 1e-2, 4, 0.0)
    losses = steps(model, optimizer, torch.arange(10), 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", comoving.recipes())
@pytest.mark.parametrize("kind", ["matrices", "complex tensors"])
def test_every_recipe_trains_at_its_own_rate(kind, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net() if kind == "matrices" else Spectral()
        x = torch.arange(10) if kind == "matrices" else torch.randn(2, 4, 6, 5, dtype=torch.complex64)
    contender = contenders.parse(name)
    losses = steps(model, contender.build(model, 3e-3 * contender.relative_rate, 0.25, 0.0), x, 8)
    assert losses[-1] < losses[0]
