"""One thread, or as many as ``TEST_THREADS`` says; a fixed Hypothesis profile; pairs of arguments unless ``--full``."""

import gc
import os

import pytest
import torch
from hypothesis import settings

from pairwise import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("fixed")


def freeze():
    """Let no garbage collection go through what lives now: the items, and libraries, which live to the end."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    freeze()


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What earlier modules imported and left behind is of no concern to those that collect and count."""
    freeze()
