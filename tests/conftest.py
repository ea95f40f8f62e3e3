"""One thread, so that results and times do not depend on the machine, and one fixed Hypothesis profile."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("fixed")
