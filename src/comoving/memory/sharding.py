"""What one of N ranks holds when a parameter is sharded along its first dimension."""

from collections.abc import Mapping
from math import prod

from torch import Tensor, nn

from ..codecs import Spec
from ..sites import Site
from ..state import spec_bytes

_BY_ROWS = ("frame.0", "feedback.", "sparse.")


def share(count: int, ranks: int) -> int:
    """Rows of the largest shard: ceil(count / ranks)."""
    return -(-count // ranks)


def shard_bytes(p: Tensor, ranks: int) -> int:
    """Bytes of a rank's rows of a parameter."""
    rows = p.shape[0] if p.ndim else 1
    return p.numel() // max(1, rows) * share(rows, ranks) * p.element_size()


def state_on_rank(site: Site, name: str, spec: Spec, kinds: Mapping[str, str], ranks: int) -> int:
    """Bytes of one slot on one rank.

    A rank's rows of the parameter come with the same rows of everything that has them: a dense parameter's moments, the
    feedback, the factor of mode 0, moments of a core whose first mode is whole. The first mode of a core that is
    compressed there is dealt out too, since the sum of the ranks' contributions can be scattered over it. Factors of
    other modes, statistics of single modes, a finder's memory and single numbers are whole on every rank. Blocks along
    the first mode are dealt out whole.

    Args:
        site: of the parameter.
        name: of the slot, behind "<block>." for a block's.
        spec: of the tensor as it is stored.
        kinds: slot name -> what it is, by the part of the plan.
        ranks: N.
    """
    size = spec_bytes(spec)
    if ranks == 1 or not spec.shape:
        return size
    own = name
    if site.blocks:
        number, _, own = name.partition(".")
        if site.block_mode == 0:
            return size if int(number) < share(site.blocks, ranks) else 0
    sharded = site.plain or own.startswith(_BY_ROWS) or kinds.get(own) == "moments"
    if not sharded:
        return size
    return prod(spec.shape[1:]) * share(spec.shape[0], ranks) * spec.dtype.itemsize


def units(module: nn.Module) -> list[list[Tensor]]:
    """The parameters that FSDP gathers together: each entry of a list of layers is a unit, the rest is one more."""
    seen: set[int] = set()
    found: list[list[Tensor]] = []
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                own: list[Tensor] = [p for p in layer.parameters() if id(p) not in seen]
                seen |= {id(p) for p in own}
                found.append(own)
    rest: list[Tensor] = [p for p in module.parameters() if id(p) not in seen]
    return [unit for unit in (*found, rest) if unit]


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of their entries."""
    return sum(p.numel() * p.element_size() for p in tensors)
