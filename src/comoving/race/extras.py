"""Optional packages: imported where they are used, missed with a message that says what to install."""

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import ``module``, which the extra ``extra`` of this package brings.

    Raises:
        ImportError: if it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{package} is not installed: pip install "comoving[{extra}]"') from error
