"""Settings of the whole suite."""

from __future__ import annotations

import torch

# The models of the tests are tiny: threads cost more than they give, most of all where tests or other work run side by
# side. Tests of threading set their own count.
torch.set_num_threads(1)
