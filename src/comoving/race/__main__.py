"""``python -m comoving.race``: the same as ``comoving race``."""

import sys

from comoving.cli import main

if __name__ == "__main__":
    main(["race", *sys.argv[1:]])
