"""The state of one block within the flat state of its parameter."""

from collections.abc import Iterator, MutableMapping
from typing import Any


class Section(MutableMapping[str, Any]):
    """The slots "<block>.<name>" of a flat state, by their names.

    Args:
        whole: the state of the parameter.
        block: the number of the block.
    """

    def __init__(self, whole: dict[str, Any], block: str) -> None:
        self.whole, self._prefix = whole, f"{block}."
        self._names = {
            name.removeprefix(self._prefix): name for name in whole if name.startswith(self._prefix)
        }  # so that nobody has to search all blocks for the slots of one

    def __getitem__(self, name: str) -> Any:
        return self.whole[self._names[name]]

    def __setitem__(self, name: str, value: Any) -> None:
        self.whole[self._names.setdefault(name, self._prefix + name)] = value

    def __delitem__(self, name: str) -> None:
        del self.whole[self._names.pop(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def blocks_in(whole: dict[str, Any]) -> list[str]:
    """The numbers of the blocks that have slots in a flat state, in the order in which these came."""
    return list(dict.fromkeys(block for block, dot, _ in (name.partition(".") for name in whole) if dot))
