"""How the entries of a parameter are spread over processes: what a DTensor says, in the engine's words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportPrivateUsage]

from .. import state as slots
from ..codecs import Codec
from ..frames import Modes
from ..frames.base import Side
from ..precondition import Plain
from ..sites import Shard as Part
from ..sites import Site
from .comms import Shards

Piece = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Spread:
    """The entries of a parameter over the processes of a group.

    Args:
        mesh: the parameter's own.
        placements: one for each dimension of the mesh: ``Shard``, what FSDP makes of it over tensor parallelism, or
            ``Replicate``.
        shape: of the whole parameter.
        group: the processes that have different entries; None where each has all.
        rank: of this process in the group.
        pieces: what each of them has, in the group's order.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    group: dist.ProcessGroup | None
    rank: int
    pieces: tuple[Piece, ...]

    @property
    def cut(self) -> bool:
        """Whether processes have different entries."""
        return len(self.pieces) > 1

    @cached_property
    def mode(self) -> int | None:
        """The only mode that is cut; None where several are."""
        modes = {dim for dim in map(cut_along, self.placements) if dim is not None}
        return next(iter(modes)) if len(modes) == 1 and self._tiles(next(iter(modes))) else None

    def _tiles(self, mode: int) -> bool:
        parts = sorted((piece[mode].start, piece[mode].stop) for piece in self.pieces)
        full = [(a, b) for a, b in parts if a < b] or [(0, 0)]
        ends = [0, *(b for _, b in full)]
        return [a for a, _ in full] == ends[:-1] and ends[-1] == self.shape[mode]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many entries of the mode each process has."""
        assert self.mode is not None
        return tuple(piece[self.mode].stop - piece[self.mode].start for piece in self.pieces)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first entry of the mode that each process has, whatever their order."""
        assert self.mode is not None
        return tuple(piece[self.mode].start for piece in self.pieces)

    @cached_property
    def comm_of_all(self) -> Shards:
        """What finds the largest figure of all."""
        return Shards(self.group, 0, (0,) * len(self.pieces), self.rank, torch.device(self.mesh.device_type))

    @cached_property
    def comm(self) -> Shards:
        """What joins products of the pieces."""
        assert self.mode is not None
        return Shards(self.group, self.mode, self.sizes, self.rank, torch.device(self.mesh.device_type), self.starts)

    def placed(self, dim: int) -> list[Placement]:
        """The placements of what is cut along this dimension as the parameter is along its mode."""
        return [_moved(place, dim) for place in self.placements]

    def places(self, x: Tensor) -> bool:
        """Whether a tensor is spread as the parameter is."""
        return isinstance(x, DTensor) and x.placements == self.placements and x.device_mesh == self.mesh

    def here(self, x: Tensor) -> Tensor:
        """What is here of the parameter, or of its gradient."""
        given: Any = x
        return given.to_local()

    def sharded(self, x: Tensor, dim: int, shape: tuple[int, ...]) -> DTensor:
        """What is here of a tensor of this shape, whose dimension counts the mode, as one tensor of all processes."""
        placed = self.placed(dim)
        strides = torch.empty(shape, device="meta").stride()
        size = torch.Size(shape)
        return DTensor.from_local(x.contiguous(), self.mesh, placed, run_check=False, shape=size, stride=strides)


def cut_along(place: Placement) -> int | None:
    """The dimension that a placement cuts; None where it cuts none."""
    return place.dim if isinstance(place, Shard | _StridedShard) else None


def _moved(place: Placement, dim: int) -> Placement:
    if isinstance(place, _StridedShard):
        return _StridedShard(dim, split_factor=place.split_factor)
    return Shard(dim) if isinstance(place, Shard) else place


def spread_of(p: Tensor, name: str) -> Spread | None:
    """How the entries of a DTensor are spread; None of any other tensor.

    A collective call where several dimensions of its mesh cut it.

    Raises:
        ValueError: a sum that is still to be made.
    """
    if not isinstance(p, DTensor):
        return None
    mesh, placements, shape = p.device_mesh, p.placements, tuple(p.shape)
    odd = [place for place in placements if cut_along(place) is None and not place.is_replicate()]
    if odd:
        raise ValueError(f"{name} is placed as {odd[0]}, which is no parameter's: shard or replicate it")
    cut = [i for i, place in enumerate(placements) if cut_along(place) is not None and mesh.size(i) > 1]
    whole = tuple(slice(0, d) for d in shape)
    if not cut:
        return Spread(mesh, tuple(placements), shape, None, 0, (whole,))
    if len(cut) == 1:
        (dim,) = cut
        place: Any = placements[dim]
        pieces = chunks(shape, place.dim, mesh.size(dim))
        return Spread(mesh, tuple(placements), shape, mesh.get_group(dim), mesh.get_local_rank(dim), pieces)
    group = _group_of(mesh, tuple(cut))
    sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    own = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    given: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(given, own, group=group)
    pieces = [tuple(slice(a, b) for a, b in piece) for piece in given]
    return Spread(mesh, tuple(placements), shape, group, dist.get_rank(group), tuple(pieces))


_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[Any, dist.ProcessGroup]] = WeakKeyDictionary()


def _group_of(mesh: DeviceMesh, dims: tuple[int, ...]) -> dist.ProcessGroup:
    """The processes along several dimensions of a mesh, this one among them.

    A group of our own: once a mesh was flattened, torch puts together by it what is cut along these dimensions, as if
    it had been cut in one go, and unevenly cut parameters come out wrong.
    """
    world = dist.group.WORLD
    assert world is not None
    found = _GROUPS.setdefault(world, {})
    if (mesh, dims) not in found:
        rest = [i for i in range(mesh.ndim) if i not in dims]
        rows = mesh.mesh.permute(*rest, *dims).reshape(-1, prod(mesh.size(i) for i in dims)).tolist()
        (ranks,) = (row for row in rows if dist.get_rank() in row)
        group: Any = dist.new_group(ranks, use_local_synchronization=True)
        found[mesh, dims] = group
    return found[mesh, dims]


def chunks(shape: tuple[int, ...], mode: int, count: int) -> tuple[Piece, ...]:
    """What each of so many processes has of a tensor that is cut along a mode: ceil(d / count) entries, or the rest."""
    step = -(-shape[mode] // count)
    ends = [min(shape[mode], step * i) for i in range(count + 1)]
    whole = [slice(0, d) for d in shape]
    return tuple((*whole[:mode], slice(a, b), *whole[mode + 1 :]) for a, b in zip(ends[:-1], ends[1:], strict=True))


def other_side(spread: Spread) -> Side | None:
    """The side of a matrix that is not cut; None of what is none, or is cut along both."""
    modes = [n for n, d in enumerate(spread.shape) if d > 1]
    if not spread.cut or spread.mode is None or len(modes) != 2 or spread.mode not in modes:
        return None
    return "right" if spread.mode == modes[0] else "left"


def shared_out(site: Site, group: Mapping[str, Any], spread: Spread) -> bool:
    """Whether each process can step its own entries of a parameter, and find frames together with the others.

    Where no part looks at several entries along the mode that is cut, but for what an operand joins; and no codec's
    block crosses a cut, or draws random numbers in the order of entries.

    Where a frame compresses that mode, all processes have the core, the sum of what their entries give, and step it
    alike: codecs of moments may be any then. But it may have no more entries than the process that has most of the
    parameter: moments of a larger one, N times there, take more than those of a sharded dense parameter, and a sum of
    such cores costs about what dealing does.
    """
    mode, view = spread.mode, site.view
    if mode is None or site.coded or not (view.name == "tensor" or (mode == 0 and view.name in {"matrix", "pairs"})):
        return False
    if site.plain:
        return True
    if site.blocks:
        return view.name == "tensor" and site.block_mode == mode
    parts = slots.parts_of(site, group)
    if slots.in_weights(parts):
        return False
    across = site.projected and site.ranks[mode] is not None
    if across and prod(site.core_shape) * view.shape[mode] > prod(view.shape) * max(spread.sizes):
        return False
    codecs: list[Codec] = [*([] if across else [parts["moments"]]), *([parts["codec"]] if site.projected else [])]
    return (
        parts["rule"].elementwise
        and parts["precondition"] == Plain()
        and all(_by_entries(codec, mode, view.shape, site) for codec in codecs)
        and (not site.projected or _found_together(parts))
    )


def _found_together(parts: Mapping[str, Any]) -> bool:
    """Whether frames can be found by those who have some entries of one mode each."""
    fixed = type(parts["frame"]) is Modes and not parts["ranks"].adaptive
    return fixed and parts["finder"].joint and parts["residual"].entrywise


def _by_entries(codec: Codec, mode: int, shape: tuple[int, ...], site: Site) -> bool:
    """Whether what is stored of some entries along a mode is part of what is stored of all."""
    shapes = [(*shape[:mode], n, *shape[mode + 1 :]) for n in (2, 4)]
    few, more = (codec.schema(own, site.view.dtype) for own in shapes)
    return all(
        not spec.seed and spec.shape and more[name].shape == _doubled(spec.shape, mode) for name, spec in few.items()
    ) and (mode == 0 or all(spec.shape == shapes[0] for spec in few.values()))


def _doubled(shape: tuple[int, ...], mode: int) -> tuple[int, ...]:
    return (*shape[:mode], 2 * shape[mode], *shape[mode + 1 :]) if mode < len(shape) else ()


def place_all(
    params: Sequence[Tensor],
    sites: Sequence[Site],
    group: Mapping[str, Any],
    spreads: Mapping[Tensor, Spread],
    decide: Callable[[Mapping[Tensor, Side]], list[Site]],
    loads: dict[Any, list[float]],
) -> list[Site]:
    """The sites of parameters that processes share: who steps what, on the sides that are not cut where one may choose.

    Args:
        params: the parameters.
        sites: what was decided about each, as if it were whole.
        group: their hyper-parameters.
        spreads: of those that are shared.
        decide: what is decided about all of them with other sides for some.
        loads: by groups of processes, how many entries each process steps for others so far; changed.
    """
    if group["side"] == "auto":
        sides: dict[Tensor, Side] = {}
        for p, spread in spreads.items():
            if (side := other_side(spread)) is not None:
                sides[p] = side
        turned = dict(zip(params, decide(sides), strict=True))
        sites = decide({p: side for p, side in sides.items() if shared_out(turned[p], group, spreads[p])})
    found = dict(zip(params, sites, strict=True))
    for p, spread in sorted(spreads.items(), key=lambda pair: -pair[0].numel()):  # large ones first: loads even out
        load = loads.setdefault(spread.group, [0.0] * len(spread.pieces))
        found[p] = placed(found[p], group, spread, load)
    return [*found.values()]


def placed(site: Site, group: Mapping[str, Any], spread: Spread, load: list[float]) -> Site:
    """The site with what is here of it, or with the process that steps it for all.

    Args:
        site: of the whole parameter.
        group: its hyper-parameters.
        spread: of its entries.
        load: how many entries each process of the group steps for others so far; changed.

    Raises:
        ValueError: weights in codes.
    """
    if not spread.cut:
        return site
    if shared_out(site, group, spread):
        assert spread.mode is not None
        name = "" if spread.group is None else spread.group.group_name
        return replace(site, shard=Part(spread.mode, spread.sizes, spread.rank, spread.starts, name))
    if site.coded:
        raise ValueError(f"{site.name}: weights in codes cannot be sharded")
    owner = load.index(min(load))
    load[owner] += prod(site.view.shape)
    return replace(site, owner=owner)
