"""What the hardware could do at most, so that a step's speed can be stated as model FLOPs utilisation (MFU)."""

import time

import torch

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "A10": 125.0,
}
"""Dense bfloat16 peaks from the vendor's data sheets, by a part of the device's name."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that MFU is stated against: a GPU's data sheet (bf16), or what a large matrix product reaches on this CPU.

    None for a GPU that the table does not know, or in fp32 on a GPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
        return known[0] * 1e12 if known and precision == "bf16" else None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return _measured_matmul(dtype)


def _measured_matmul(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
