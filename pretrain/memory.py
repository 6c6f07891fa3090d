"""How much memory this process has needed at most."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: what PyTorch has allocated on a GPU, or what the system says the process has held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
