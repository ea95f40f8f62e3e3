"""One thread, or as many as ``TEST_THREADS`` says; a fixed Hypothesis profile; pairs of arguments unless ``--full``."""

import gc
import os

import torch
from hypothesis import settings

from pairwise import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("fixed")


def pytest_collection_finish():
    """The items live to the end: no garbage collection needs to go through them, least of all those of tests."""
    gc.collect()
    gc.freeze()
