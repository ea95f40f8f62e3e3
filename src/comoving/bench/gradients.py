"""Streams of gradients: saved from short real trainings, or made with a subspace that is known and turns."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from comoving.linalg import qr
from comoving.race.extras import require
from comoving.race.tasks import TASKS

Choice = Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class Stream:
    """Gradients of one parameter, step after step.

    Args:
        name: for tables.
        gradients: all of one shape and dtype.
        rank: of the frames that are to follow them.
    """

    name: str
    gradients: list[Tensor]
    rank: int | float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each gradient."""
        return tuple(self.gradients[0].shape)


def saved(
    task: Any, model: nn.Module, wanted: Mapping[str, Choice], *, warmup: int, steps: int, batch: int, rate: float
) -> dict[str, list[Tensor]]:
    """Gradients of the last ``steps`` of ``warmup + steps`` steps of torch's AdamW, seed 0, for each chosen parameter.

    Raises:
        ValueError: a choice that fits no parameter.
    """
    chosen = {
        name: next((p for full, p in model.named_parameters() if fits(full, p)), None) for name, fits in wanted.items()
    }
    for name, p in chosen.items():
        if p is None:
            raise ValueError(f"the model has no parameter for {name}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for step in range(warmup + steps):
        optimizer.zero_grad()
        task.loss(model, task.batch(batch, generator)).backward()
        if step >= warmup:
            for name, p in chosen.items():
                assert p is not None and p.grad is not None
                found[name].append(p.grad.detach().clone())
        optimizer.step()
    return found


def _ends(suffix: str, name: str, p: Tensor) -> bool:
    return name.endswith(suffix)


def _spectral(name: str, p: Tensor) -> bool:
    return p.is_complex() and p.ndim == 4


def from_training(warmup: int, steps: int, wide: bool = True) -> list[Stream]:
    """Streams of two matrices of ``lm`` and of a spectral weight of ``fno``, each at two ranks.

    The first rank is the one that the task races with. Early gradients have almost no energy outside of it, so that
    there is a second one, of a sixteenth of the directions or a hundredth of the entries, that tells finders apart.

    Args:
        warmup: steps before the first gradient that is kept.
        steps: gradients per stream.
        wide: also the same FNO with 64 channels instead of 24, after a quarter of the warm-up.
    """
    streams: list[Stream] = []

    def add(found: dict[str, list[Tensor]], ranks: Sequence[int | float]) -> None:
        for name, gradients in found.items():
            streams.extend(Stream(f"{name}, rank {rank:g}", gradients, rank) for rank in ranks)

    lm, fno = TASKS["lm"], TASKS["fno"]
    with torch.random.fork_rng(devices=[]):
        task = lm.load()
        torch.manual_seed(0)
        wanted = {
            "lm 128x128": partial(_ends, "layers.1.self_attn.q_proj.weight"),
            "lm 352x128": partial(_ends, "layers.1.mlp.gate_proj.weight"),
        }
        found = saved(task, task.model(), wanted, warmup=warmup, steps=steps, batch=lm.batch, rate=lm.rate)
        add(found, (lm.rank, 8))
        task = fno.load()
        for channels in (24, 64) if wide else (24,):
            torch.manual_seed(0)
            model = task.model() if channels == 24 else _wide(channels)
            before = warmup if channels == 24 else warmup // 4
            wanted = {f"fno {channels}x{channels}x16x9": _spectral}
            found = saved(task, model, wanted, warmup=before, steps=steps, batch=fno.batch, rate=fno.rate)
            add(found, (fno.rank, 0.01))
    return streams


def _wide(channels: int) -> nn.Module:
    fno = require("neuralop.models", "pde").FNO
    return fno(n_modes=(16, 16), in_channels=1, out_channels=1, hidden_channels=channels, n_layers=4)


def train_tensor(size: int, order: int, rank: int, noise: float, seed: int) -> Tensor:
    """A float32 tensor of TT ranks ``rank``, its entries of RMS 1, plus ``noise`` times a Gaussian one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.ones(1, 1)
    for k in range(order):
        after = 1 if k == order - 1 else rank
        x = (x @ torch.randn(x.shape[1], size * after, generator=generator)).reshape(-1, after)
        x = x / x.square().mean().sqrt()
    x = x.reshape((size,) * order)
    return x.add_(torch.randn(x.shape, generator=generator), alpha=noise) if noise else x


def turning(
    size: int, order: int, rank: int, steps: int, *, angle: float = 0.02, noise: float = 0.3, seed: int = 0
) -> Iterator[Tensor]:
    """Gradients X_t = B_L(t) Z_t B_R(t)^T + noise, of TT and HT ranks ``rank`` but for the noise, that turn slowly.

    Each interface is a tree of one branch, B <- (B (x) U_k) T_k; every U_k and T_k turns by ``angle`` per step from one
    Gaussian matrix to another. Z_t is a fresh (rank, rank) matrix with singular values that fall from 1 to 1/rank. The
    noise has ``noise`` times the norm of the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    sides = [[_Turning(draw, size, rank, k == 0) for k in range(count)] for count in (order // 2, order - order // 2)]
    weights = 1 / torch.arange(1, rank + 1)
    for t in range(steps):
        left, right = (_interface([step.at(angle * t) for step in side]) for side in sides)
        q, _ = qr(draw(rank, rank))
        x = (left * weights) @ (q @ right.mT)
        x = x.add_(draw(*x.shape), alpha=noise * float(x.norm()) / math.sqrt(x.numel()))
        yield x.reshape((size,) * order)


class _Turning:
    """U_k and T_k, each between two Gaussian matrices; the first mode of a side has no T."""

    def __init__(self, draw: Callable[..., Tensor], size: int, rank: int, first: bool) -> None:
        self.ends = [
            (draw(size, rank), draw(size, rank)),
            *([] if first else [(draw(rank * rank, rank), draw(rank * rank, rank))]),
        ]

    def at(self, angle: float) -> list[Tensor]:
        """Both at this angle."""
        return [math.cos(angle) * a + math.sin(angle) * b for a, b in self.ends]


def _interface(steps: list[list[Tensor]]) -> Tensor:
    """Its basis, columns made orthonormal."""
    x = steps[0][0]
    for leaf, transfer in steps[1:]:
        r = transfer.shape[1]
        x, _ = qr(torch.kron(x, leaf) @ transfer.reshape(r * r, r))
    return qr(x)[0]
