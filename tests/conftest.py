from __future__ import annotations

import torch

# Most operations here are tiny: a second thread costs more than it brings, and stalls on a busy machine.
torch.set_num_threads(1)
