"""The standard log."""

import logging
import re
from collections.abc import Mapping


class Log:
    """One line a matrix and reading, without the figures that have numbers (sv3, cos_u2, ...).

    Args:
        logger: or its name.
        level: of the lines.
    """

    def __init__(self, logger: logging.Logger | str = "comoving.directions", level: int = logging.INFO) -> None:
        self.logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self.level = level

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Lines "update 101 spec/<module>/grad sigma_max=0.52 cos_u_max=0.98 ..."."""
        lines: dict[str, list[str]] = {}
        for name, value in values.items():
            path, _, field = name.rpartition("/")
            if not re.fullmatch(r"(sv|cos_[uv])\d+", field):
                lines.setdefault(path, []).append(f"{field}={value:.4g}")
        for path, fields in lines.items():
            self.logger.log(self.level, "update %d %s %s", step, path, " ".join(fields))

    def close(self) -> None:
        """Nothing is buffered."""
