"""What GPUs and the wires between them can do: vendors' data sheets, and the share of it that training reaches.

The shares are assumptions, from published runs: llm-foundry's tables of MPT-7B at 4,096 tokens with full recomputation
(54.8% of an A100's peak in useful operations and 40.4% of an H100's; a third more with what is recomputed), and NCCL's
bus bandwidth in large collectives, about four fifths of the wire.
"""

from dataclasses import dataclass

GIB, GB, TERA = 2**30, 1e9, 1e12
FILLED = 0.9
"""Share of the memory that tensors may take; the rest is for CUDA, NCCL and fragmentation."""


@dataclass(frozen=True)
class Gpu:
    """One kind of machine.

    Args:
        memory: bytes.
        flops: dense bf16 FLOP/s, by the data sheet.
        reached: share of them that a step's matrix products reach.
        memory_bandwidth: bytes/s.
        inside: bytes/s of a GPU to the others of its node, one way (NVLink).
        outside: bytes/s of a GPU to other nodes, one way; a node has such an adapter for every GPU.
    """

    memory: float
    flops: float
    reached: float
    memory_bandwidth: float
    inside: float
    outside: float

    def bandwidth(self, num_nodes: int, ranks_per_node: int) -> float:
        """Bus bandwidth of a collective over ranks of one node, or of several, with an adapter each of these ranks."""
        wire = self.inside if num_nodes == 1 else min(self.inside, ranks_per_node * self.outside)
        return 0.8 * wire


GPUS = {
    "a100-80": Gpu(80 * GIB, 312 * TERA, 0.65, 2039 * GB, 300 * GB, 25 * GB),
    "h100": Gpu(80 * GIB, 989 * TERA, 0.50, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Gpu(141 * GB, 989 * TERA, 0.50, 4800 * GB, 450 * GB, 50 * GB),
}


def find(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        ValueError: the table does not know it.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is not in the table: use one of {', '.join(GPUS)}")
    return GPUS[name]
