"""Set-up shared by all tests. Its place beside `__init__.py` also makes `tests.golden_vectors` importable from every
folder."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the tests run side by side (pytest -n); more threads only get in each other's way
