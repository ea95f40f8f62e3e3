"""Where decompositions live: in one package, which the finders call and which knows no finder."""

import ast
from pathlib import Path

import comoving

HOME = Path(comoving.__file__).parent


def imported(file):
    """(module, name) of every relative import."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_finders_have_no_decompositions_of_their_own():
    for file in (HOME / "finders").glob("*.py"):
        own = {name for module, name in imported(file) if module.startswith("linalg")}
        assert not own & {"eigh", "svd", "qr_triangle", "pinv"}, file


def test_decompositions_are_made_of_linear_algebra_alone():
    for folder, below in (("decompositions", {"linalg"}), ("linalg", set())):
        for file in (HOME / folder).glob("*.py"):
            tree = ast.parse(file.read_text())
            above = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 2]
            assert {(n.module or "").split(".")[0] for n in above} <= below, file
