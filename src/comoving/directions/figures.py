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

COLD, WARM = 8, 3
"""Krylov iterations from a random start and from the last reading's directions."""
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


def spectra_of(
    matrices: Mapping[Key, Tensor], last: Mapping[Key, Spectrum], k: int, full: bool, seed: int
) -> dict[Key, Spectrum]:
    """The k leading triplets of every matrix, each from the directions of its last reading where there are any.

    Args:
        matrices: (m, n) each; finite.
        last: the reading before.
        k: triplets.
        full: by complete decompositions instead.
        seed: of the random columns.
    """
    found: dict[Key, Spectrum] = {}
    for keys in _batches(matrices, last):
        stack = torch.stack([working(matrices[key]) for key in keys])
        short = "v" if stack.shape[-2] >= stack.shape[-1] else "u"
        if full:
            result = exact(stack, k)
        elif keys[0] in last:
            start = torch.stack([getattr(last[key], short) for key in keys])
            result = leading(stack, k, start, WARM, seed=seed)
        else:
            result = leading(stack, k, None, COLD, seed=seed)
        for i, key in enumerate(keys):
            found[key] = Spectrum(*(x[i].clone() for x in result))
    return found


def figures(
    matrices: Mapping[Key, Tensor], now: Mapping[Key, Spectrum], last: Mapping[Key, Spectrum]
) -> dict[str, float]:
    """Names and values of a reading; see :class:`comoving.directions.SpectralMonitor`. The device is read once."""
    device = next(iter(matrices.values())).device
    names: list[str] = []
    rows: list[Tensor] = []
    for keys in _batches(matrices, last):
        fields, table = _table(keys, matrices, now, last)
        names += [key.path + field for key in keys for field in fields]
        rows.append(table.flatten().to(device, torch.float64))
    return dict(zip(names, torch.cat(rows).tolist(), strict=True))


def _batches(matrices: Mapping[Key, Tensor], last: Mapping[Key, Spectrum]) -> Iterator[list[Key]]:
    """Keys of matrices that can be decomposed together: of one shape, all with a last reading or all without."""
    alike: dict[object, list[Key]] = {}
    for key, x in matrices.items():
        energies = tuple(Key(key.name, kind) in last for kind in ("momentum", "weight"))
        about = (x.shape, working(x[:0]).dtype, x.device, key in last, key.kind == "weight", energies)
        alike.setdefault(about, []).append(key)
    for keys in alike.values():
        count = max(1, _BATCH_ENTRIES // matrices[keys[0]].numel())
        yield from (keys[i : i + count] for i in range(0, len(keys), count))


def _table(
    keys: list[Key], matrices: Mapping[Key, Tensor], now: Mapping[Key, Spectrum], last: Mapping[Key, Spectrum]
) -> tuple[list[str], Tensor]:
    """Fields, and their values for each key: (keys, fields)."""
    s = torch.stack([now[key].s for key in keys])
    k = s.shape[-1]
    fields, columns = ["sigma_max", *_numbered("sv", k)], [s[:, :1], s]
    if keys[0] in last:
        before = torch.stack([last[key].s for key in keys])
        size = torch.linalg.vector_norm(before, dim=-1, keepdim=True)
        change = torch.linalg.vector_norm(s - before, dim=-1, keepdim=True)
        fields.append("delta_sv_rel")
        columns.append(change / torch.where(size > 0, size, 1))
        for side in ("u", "v"):
            new, old = (_there([spectra[key] for key in keys], side) for spectra in (now, last))
            principal = principal_cosines(new, old)
            fields += [*_numbered(f"cos_{side}", k), f"cos_{side}_max", f"cos_{side}_mean"]
            columns += [vector_cosines(new, old), principal[:, :1], principal.mean(-1, keepdim=True)]
    if keys[0].kind != "weight":
        for kind, field in (("momentum", "p"), ("weight", "p_weight")):
            old = [last[Key(key.name, kind)] for key in keys if Key(key.name, kind) in last]
            if old:
                u, v = (_there(old, side) for side in ("u", "v"))
                stack = torch.stack([working(matrices[key]) for key in keys])
                fields.append(field)
                columns.append(projected_energy(stack, u, v).unsqueeze(-1))
    return fields, torch.cat(columns, -1)


def _there(spectra: list[Spectrum], side: str) -> Tensor:
    """The vectors of all, stacked; zero for those that belong to no singular value."""
    vectors = torch.stack([spectrum.u if side == "u" else spectrum.v for spectrum in spectra])
    seen = present(torch.stack([spectrum.s for spectrum in spectra]), (len(spectra[0].u), len(spectra[0].v)))
    return vectors * seen.unsqueeze(-2)


def _numbered(name: str, k: int) -> list[str]:
    return [f"{name}{i}" for i in range(1, k + 1)]
