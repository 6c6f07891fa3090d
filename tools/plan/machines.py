"""What GPUs and the wires between them can do: vendors' data sheets, and the share of it that training reaches.

The shares are assumptions, from published runs: llm-foundry's tables of MPT-7B at 4,096 tokens with full recomputation
(54.8% of an A100's peak in useful operations and 40.4% of an H100's; a third more with what is recomputed), and NCCL's
bus bandwidth in large collectives, about four fifths of the wire; copies over PCIe are given the same.
"""

from dataclasses import dataclass

GIB, GB, TERA = 2**30, 1e9, 1e12
FILLED = 0.9
"""Share of the memory that tensors may take; the rest is for CUDA, NCCL and fragmentation."""
REACHED_OF_WIRE = 0.8
"""Share of a wire's bandwidth that large transfers reach."""


@dataclass(frozen=True)
class Gpu:
    """One kind of machine.

    Args:
        memory: bytes.
        flops: dense bf16 FLOP/s, by the data sheet.
        fp32_flops: FLOP/s in float32, which PyTorch does not round to TF32 unless it is asked to.
        reached: share of them that a step's matrix products reach.
        memory_bandwidth: bytes/s.
        inside: bytes/s of a GPU to the others of its node, one way (NVLink).
        outside: bytes/s of a GPU to other nodes, one way; a node has such an adapter for every GPU.
        pcie: bytes/s of a GPU to its host, one way: 16 lanes of the generation that the data sheet names.
        host_bandwidth: bytes/s of the host's memory, a GPU's eighth of it: the channels of a DGX's two processors.
    """

    memory: float
    flops: float
    fp32_flops: float
    reached: float
    memory_bandwidth: float
    inside: float
    outside: float
    pcie: float
    host_bandwidth: float

    def bandwidth(self, num_nodes: int, ranks_per_node: int) -> float:
        """Bus bandwidth of a collective over ranks of one node, or of several, with an adapter each of these ranks."""
        wire = self.inside if num_nodes == 1 else min(self.inside, ranks_per_node * self.outside)
        return REACHED_OF_WIRE * wire

    @property
    def host_wire(self) -> float:
        """Bytes/s that copies to and from the host reach."""
        return REACHED_OF_WIRE * self.pcie


DGX_A100, DGX_H100 = 16 * 25.6 * GB / 8, 16 * 38.4 * GB / 8
"""Of a GPU: sixteen channels of DDR4-3200 (two EPYC 7742), of DDR5-4800 (two Xeon 8480C)."""
GPUS = {
    "a100-80": Gpu(80 * GIB, 312 * TERA, 19.5 * TERA, 0.65, 2039 * GB, 300 * GB, 25 * GB, 32 * GB, DGX_A100),
    "h100": Gpu(80 * GIB, 989 * TERA, 67 * TERA, 0.50, 3350 * GB, 450 * GB, 50 * GB, 64 * GB, DGX_H100),
    "h200": Gpu(141 * GB, 989 * TERA, 67 * TERA, 0.50, 4800 * GB, 450 * GB, 50 * GB, 64 * GB, DGX_H100),
}


def find(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        ValueError: the table does not know it.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is not in the table: use one of {', '.join(GPUS)}")
    return GPUS[name]
