"""How a frame lies in the state: as the layout's own tensors, or with its factors in a codec's few bits.

A coded factor U_n (d_n, r_n) is stored as the rows of U_n^T, so that every direction has steps of its own, in slots
"frame.n.<name>", with its rank in "frame.n.rank": padded codes do not show it. What is used is never U_n itself but the
orthonormal basis of what is decoded, from the refresh on at which it is stored; until the next one the codes stay as
they are, and every use of the frame has the same bits.

Of a batch, factors are (*rows, d_n, r_n), and codes and seeds have its members in front too; ranks are those of all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, Full, Spec
from ..draws import scramble
from ..linalg import asks_host, orthogonality_defect, orthonormalize, over, trouble
from .base import Frame, Ranks

PREFIX = "frame."
RANK = PREFIX + "{}.rank"
"""The slot, by the mode, of a rank that the factor does not show."""
_FACTOR = PREFIX + "{}"
_TRIES = 4


def schema(group: Mapping[str, Any], shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
    """What the state holds of a frame of these ranks."""
    found: dict[str, Spec] = group["frame"].schema(shape, ranks, dtype)
    codec: Codec = group["bases"]
    if isinstance(codec, Full):
        return found
    for n in range(len(shape)):
        if (name := _FACTOR.format(n)) in found:
            size, rank = found.pop(name).shape
            found |= {f"{name}.{own}": spec for own, spec in codec.schema((rank, size), dtype).items()}
            found[RANK.format(n)] = Spec((), torch.int64, scalar=True)
    return found


def ranks(state: Mapping[str, Any], shape: tuple[int, ...]) -> Ranks | None:
    """The ranks that the state says in so many words; None where it says none.

    Raises:
        ValueError: a rank that no factor has.
    """
    stored = [state.get(RANK.format(n)) for n in range(len(shape))]
    if all(rank is None for rank in stored):
        return None
    said = tuple(None if rank is None else int(rank) for rank in stored)
    if not all(r is None or 1 <= r <= d for r, d in zip(said, shape, strict=True)):
        raise ValueError(f"the state's frame has ranks {said}, which no frame of a tensor of shape {shape} has")
    return said


def load(
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    like: Tensor | None = None,
) -> Frame:
    """The frame in the state, with coded factors decoded and made orthonormal; whole where there is none.

    Args:
        group: hyper-parameters.
        state: of the parameter.
        shape: of the tensor that is framed.
        dtype: of coded factors, once decoded.
        like: as in :meth:`comoving.frames.base.Layout.load`.
    """
    codec = group["bases"]
    if isinstance(codec, Full) or (said := ranks(state, shape)) is None:
        return group["frame"].load(state, shape, like)
    factors = {
        (name := _FACTOR.format(n)): _decoded(codec, _of(state, name), r, d, dtype)
        for n, (r, d) in enumerate(zip(said, shape, strict=True))
        if r is not None
    }
    return group["frame"].load({**state, **factors}, shape, like)


def put(
    group: Mapping[str, Any],
    state: dict[str, Any],
    new: Any,
    old: Any,
    shape: tuple[int, ...],
    key: tuple[int, ...],
    mates: Sequence[tuple[int, ...]] = (),
) -> Any:
    """Store a frame instead of the one in the state, and return it as it will be loaded from now on.

    A coded factor that has not changed keeps its codes, member by member: to encode it again would move it at every
    refresh.

    Args:
        group: hyper-parameters.
        state: of the parameter; changed.
        new: the frame to store.
        old: that in the state, as it was loaded; None where there is none.
        shape: of the tensor that is framed; of one member of a batch.
        key: what the seeds of stochastic rounding begin from.
        mates: of a batch, such keys of all its members, which are then asked instead.

    Raises:
        RuntimeError: a codec too coarse to hold any basis of these directions.
    """
    codec: Codec = group["bases"]
    if isinstance(codec, Full):
        _replace(state, new.tensors())
        return new
    known: dict[str, Tensor] = {} if old is None else old.tensors()
    factors = {_FACTOR.format(n) for n in range(len(shape))}
    stored, used = dict[str, Tensor](), dict[str, Tensor]()
    for name, x in new.tensors().items():
        if name not in factors:
            stored[name] = x
            continue
        codes, before, ask = _of(state, name), known.get(name), asks_host(x)
        if before is not None and codes and (before is x or (ask and _same(before, x))):
            own, used[name] = codes, before
        else:
            own = _fresh(codec, codes, x, [(*one, *name.encode()) for one in mates or (key,)])
            if ask and x.ndim == 2:
                used[name] = _encoded(codec, x, own)
            else:
                used[name] = (_all_encoded if ask else _encoded_unseen)(codec, x, own)
                if before is not None and codes and before.shape == x.shape:
                    used[name] = _mixed(_unchanged(before, x), codes, before, own, used[name])
            own["rank"] = torch.tensor(x.shape[-1], device="cpu")
        stored |= {f"{name}.{each}": value for each, value in own.items()}
    _replace(state, stored)
    return group["frame"].load({**stored, **used}, shape)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether a factor has not changed; one without data, in a rehearsal, has."""
    return a is b or (a.shape == b.shape and not a.is_meta and torch.equal(a, b))


def _unchanged(a: Tensor, b: Tensor) -> Tensor:
    """(*members) bool: which factors have not changed."""
    lead = a.shape[:-2]
    return torch.zeros(lead, dtype=torch.bool, device=a.device) if a.is_meta else (a == b).flatten(-2).all(-1)


def _mixed(stays: Tensor, codes: Mapping[str, Tensor], before: Tensor, own: dict[str, Tensor], after: Tensor) -> Tensor:
    """Put the codes of members that stay back into ``own``; the basis before of these, and after of the others."""
    for name, x in own.items():
        if x.device == stays.device:  # a seed that is on the host alone goes on
            own[name] = torch.where(over(stays, x), codes[name], x)
    return torch.where(over(stays, after), before, after)


def _of(state: Mapping[str, Any], factor: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{factor}."): x for name, x in state.items() if name.startswith(f"{factor}.")}


def _replace(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith(PREFIX)]:
        del state[name]
    state.update(tensors)


def _fresh(codec: Codec, codes: Mapping[str, Tensor], u: Tensor, keys: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors to encode U into, and a seed that goes on, of each member."""
    own, lead = dict[str, Tensor](), tuple(u.shape[:-2])
    for name, spec in codec.schema((u.shape[-1], u.shape[-2]), u.dtype).items():
        if spec.seed and name in codes:
            own[name] = codes[name].clone()
        elif spec.seed:
            own[name] = torch.tensor([scramble(*key) for key in keys], device="cpu").view(lead)
        else:
            own[name] = u.new_zeros(lead + spec.shape, dtype=spec.dtype)
    return own


def _encoded(codec: Codec, u: Tensor, own: dict[str, Tensor], tries: int = _TRIES) -> Tensor:
    """Store U; return the basis that is decoded from now on.

    Few bits can make directions dependent that were not, which one pass of CholeskyQR cannot mend. What it is completed
    to is then stored instead. The defect is read on the host, at refreshes only.
    """
    size, rank = u.shape
    for left in reversed(range(tries)):
        codec.encode(u.mT.clone(memory_format=torch.contiguous_format), own)
        used = _decoded(codec, own, rank, size, u.dtype)
        # The last try need only tell a basis from none: reduced precision of products is no fault of the codec's.
        if not trouble(~(orthogonality_defect(used) <= (_tolerance(u) if left else 1e-2))):  # a NaN is none
            return used
        u = orthonormalize(codec.decode(own, (rank, size), u.dtype).mT)
    raise RuntimeError(f"bases={codec} cannot hold {rank} orthonormal directions of {size}: use more bits")


def _all_encoded(codec: Codec, u: Tensor, own: dict[str, Tensor]) -> Tensor:
    """:func:`_encoded` for a batch (members, d, r): those that few bits made dependent go on alone."""
    size, rank = u.shape[-2:]
    codec.encode(u.mT.clone(memory_format=torch.contiguous_format), own, 1)
    used = _decoded(codec, own, rank, size, u.dtype)
    worse = ~(orthogonality_defect(used) <= _tolerance(u))
    if not trouble(worse.any()):
        return used
    mended = list(used.unbind())
    for i, bad in enumerate(worse.tolist()):
        if bad:
            alone = {name: x[i] for name, x in own.items()}
            basis = orthonormalize(codec.decode(alone, (rank, size), u.dtype).mT)
            mended[i] = _encoded(codec, basis, alone, _TRIES - 1)
    return torch.stack(mended)


def _encoded_unseen(codec: Codec, u: Tensor, own: dict[str, Tensor]) -> Tensor:
    """:func:`_encoded` of (*members, d, r) on a device, for which nobody waits: all tries are made, the first counts.

    Where none holds, which nobody could be told, the basis is that of coordinate vectors, of which every code is exact.
    """
    size, rank = u.shape[-2:]
    eye = torch.eye(size, rank, dtype=u.dtype, device=u.device).expand(u.shape)
    used, done = eye, torch.zeros(u.shape[:-2], dtype=torch.bool, device=u.device)
    for left in reversed(range(_TRIES + 1)):
        trial = {name: x.clone() for name, x in own.items()}
        codec.encode((u if left else eye).mT.clone(memory_format=torch.contiguous_format), trial, u.ndim - 2)
        found = _decoded(codec, trial, rank, size, u.dtype)
        for name, x in trial.items():
            own[name] = torch.where(over(done, x), own[name], x) if x.device == done.device else x
        used = torch.where(over(done, found), used, found)
        done = done | (orthogonality_defect(found) <= _tolerance(u))
        u = orthonormalize(codec.decode(trial, (rank, size), u.dtype).mT)
    return used


def _tolerance(u: Tensor) -> float:
    return 32 * torch.finfo(u.dtype).eps * u.shape[-1] ** 0.5


def _decoded(codec: Codec, own: Mapping[str, Tensor], rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """An orthonormal basis from the codes, (*rows, d, r), without reading anything on the host: at every step."""
    return orthonormalize(codec.decode(own, (rank, size), dtype).mT, trusted=True)
