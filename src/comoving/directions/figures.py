"""The numbers of one reading, computed in batches of matrices of one shape and moved to the host at once."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import norm
from .spectra import (
    Spectrum,
    exact,
    leading,
    present,
    principal_cosines,
    projected_energy,
    vector_cosines,
    working,
)

COLD, WARM, WARM_WEIGHT = 8, 2, 3
"""Krylov iterations: from a random start; from the last reading's directions; the same of weights, which are flat."""
_BATCH_ENTRIES = 2**24


class Key(NamedTuple):
    """A matrix that is watched."""

    name: str
    kind: str

    @property
    def path(self) -> str:
        """How the names of its figures begin."""
        return f"spec/{self.name}/" + {"weight": "", "gradient": "grad/"}.get(self.kind, f"{self.kind}/")


def check_finite(matrices: Mapping[Key, Tensor]) -> None:
    """Raise for a matrix with an entry that is not finite; the device is read once.

    Raises:
        ValueError: naming layer and kind.
    """
    keys = sorted(matrices, key=lambda key: key.kind == "weight")  # a bad gradient has spoiled the weight already
    device = matrices[keys[0]].device
    sizes = torch.stack([norm(matrices[key]).to(device, torch.float64) for key in keys])
    for key, finite in zip(keys, sizes.isfinite().tolist(), strict=True):
        if not finite and not bool(matrices[key].isfinite().all()):  # a norm may overflow
            raise ValueError(
                f"the {key.kind} of {key.name} has entries that are NaN or infinite; look for a diverging loss"
            )


def reading(
    matrices: Mapping[Key, Tensor], last: Mapping[Key, Spectrum], k: int, full: bool, seed: int
) -> tuple[dict[Key, Spectrum], dict[str, float]]:
    """The k leading triplets of every matrix, and names and values of the figures; the device is read once.

    Args:
        matrices: (m, n) each; finite.
        last: the reading before, from whose directions each search starts where there are any.
        k: triplets.
        full: by complete decompositions instead.
        seed: of the random columns.
    """
    device = next(iter(matrices.values())).device
    now: dict[Key, Spectrum] = {}
    names: list[str] = []
    rows: list[Tensor] = []
    for keys in _batches(matrices, last):
        stack = working(torch.stack([matrices[key] for key in keys]))
        found = _leading(stack, keys, last, k, full, seed)
        fields, table = _table(stack, keys, found, last)
        now |= {key: Spectrum(*(x[i] for x in found)) for i, key in enumerate(keys)}
        for key in keys:
            path = key.path
            names += [path + field for field in fields]
        rows.append(table.flatten().to(device, torch.float64))
    return now, dict(zip(names, torch.cat(rows).tolist(), strict=True))


def _batches(matrices: Mapping[Key, Tensor], last: Mapping[Key, Spectrum]) -> Iterator[list[Key]]:
    """Keys of matrices that can be decomposed together: alike, all with a last reading or all without."""
    alike: dict[object, list[Key]] = {}
    for key, x in matrices.items():
        compared = tuple(Key(key.name, kind) in last for kind in ("momentum", "weight"))
        about = (x.shape, x.dtype, x.device, key in last, key.kind == "weight", compared)
        alike.setdefault(about, []).append(key)
    for keys in alike.values():
        count = max(1, _BATCH_ENTRIES // matrices[keys[0]].numel())
        yield from (keys[i : i + count] for i in range(0, len(keys), count))


def _leading(  # noqa: PLR0917
    stack: Tensor, keys: list[Key], last: Mapping[Key, Spectrum], k: int, full: bool, seed: int
) -> Spectrum:
    if full:
        return exact(stack, k)
    if keys[0] not in last:
        return leading(stack, k, None, COLD, seed=seed)
    before = [last[key] for key in keys]
    short = [x.v for x in before] if stack.shape[-2] >= stack.shape[-1] else [x.u for x in before]
    return leading(stack, k, torch.stack(short), WARM_WEIGHT if keys[0].kind == "weight" else WARM, seed=seed)


def _table(stack: Tensor, keys: list[Key], now: Spectrum, last: Mapping[Key, Spectrum]) -> tuple[list[str], Tensor]:
    """Fields, and their values for each key: (keys, fields)."""
    s, k = now.s, now.s.shape[-1]
    fields, columns = ["sigma_max", *_numbered("sv", k)], [s[:, :1], s]
    if keys[0] in last:
        before = _stacked([last[key] for key in keys])
        size = torch.linalg.vector_norm(before.s, dim=-1, keepdim=True)
        change = torch.linalg.vector_norm(s - before.s, dim=-1, keepdim=True)
        fields.append("delta_sv_rel")
        columns.append(change / torch.where(size > 0, size, 1))
        for side, new, old in zip("uv", _there(now), _there(before), strict=True):
            principal = principal_cosines(new, old)
            fields += [*_numbered(f"cos_{side}", k), f"cos_{side}_max", f"cos_{side}_mean"]
            columns += [vector_cosines(new, old), principal[:, :1], principal.mean(-1, keepdim=True)]
    if keys[0].kind != "weight":
        for kind, field in (("momentum", "p"), ("weight", "p_weight")):
            old = [last[Key(key.name, kind)] for key in keys if Key(key.name, kind) in last]
            if old:
                fields.append(field)
                columns.append(projected_energy(stack, *_there(_stacked(old))).unsqueeze(-1).to(s.dtype))
    return fields, torch.cat(columns, -1)


def _stacked(spectra: list[Spectrum]) -> Spectrum:
    return Spectrum(*(torch.stack(parts) for parts in zip(*spectra, strict=True)))


def _there(spectra: Spectrum) -> tuple[Tensor, Tensor]:
    """The vectors, zero for those that belong to no singular value."""
    seen = present(spectra.s, (spectra.u.shape[-2], spectra.v.shape[-2])).unsqueeze(-2)
    return spectra.u * seen, spectra.v * seen


def _numbered(name: str, k: int) -> list[str]:
    return [f"{name}{i}" for i in range(1, k + 1)]
