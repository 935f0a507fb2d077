"""One thread: the tests' matrices are small, and a second thread mostly waits for the first."""

import torch

torch.set_num_threads(1)
