"""Options and inputs of the pytest-benchmark suites. Timings are recorded, never asserted."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
