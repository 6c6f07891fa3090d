"""From what a rank holds and sends to whether it fits and how long it takes: a roofline, and no measurement."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from model.flops import training_flops
from pretrain.config import RunConfig

from .machines import FILLED, Gpu
from .tally import BETWEEN_DEVICES
from .trace import Trace

HIDDEN_BEHIND_WORK = ("weights", "replicate", BETWEEN_DEVICES)
"""Wires on which bytes go beside the computation, one after the other: gathered ahead, reduced behind."""
OPTIMIZER_TRAFFIC = 7 / 3
"""Bytes that AdamW moves by bytes of weights, moments: all three read and written, the gradient read."""


@dataclass(frozen=True)
class Plan:
    """What a step of a run takes on a machine.

    Args:
        peak, room: bytes that are needed at once on the GPU, and that there are.
        step_flops: useful operations of the whole step, over all ranks.
        compute_seconds: a rank's operations, recomputed ones among them, at the share of the peak that is reached.
        optimizer_seconds: where the weights are kept, on the GPU or the host.
        sending: seconds on every mesh axis, and between GPU and host.
        step_seconds: from batch to batch.
        tokens_per_second: over all ranks.
        mfu: useful operations as a share of the vendor's peak in the run's precision.
        days: for all steps.
        checkpoint_bytes: of one checkpoint.
    """

    trace: Trace
    world: int
    peak: float
    room: float
    step_flops: float
    compute_seconds: float
    optimizer_seconds: float
    sending: Mapping[str, float]
    step_seconds: float
    tokens_per_second: float
    mfu: float
    days: float
    checkpoint_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the peak finds room."""
        return self.peak <= self.room


def estimate(config: RunConfig, trace: Trace, gpu: Gpu, *, nodes: int, gpus_per_node: int) -> Plan:
    """Puts a traced step on GPUs."""
    world = nodes * gpus_per_node
    tokens = config.train.batch_tokens
    useful = _flops(config, trace, tokens)
    done = useful * _repeated(config)
    peak_flops = gpu.flops if config.train.precision == "bf16" else gpu.fp32_flops
    compute = done / world / (peak_flops * gpu.reached)
    memory = gpu.host_bandwidth if trace.host else gpu.memory_bandwidth
    optimizer = OPTIMIZER_TRAFFIC * (trace.parameters + trace.optimizer) / memory
    sending = {axis: sent / _wire(axis, trace, gpu, gpus_per_node) for axis, sent in trace.sent.items()}
    beside = sum(sending.get(axis, 0.0) for axis in HIDDEN_BEHIND_WORK)
    between = sum(seconds for axis, seconds in sending.items() if axis not in HIDDEN_BEHIND_WORK)
    seconds = max(compute, beside) + between + optimizer
    return Plan(
        trace=trace,
        world=world,
        peak=trace.peak,
        room=FILLED * gpu.memory,
        step_flops=useful,
        compute_seconds=compute,
        optimizer_seconds=optimizer,
        sending=sending,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=useful / seconds / world / peak_flops,
        days=config.train.steps * seconds / 86_400,
        checkpoint_bytes=trace.num_parameters * 4 * (4 if config.train.ema_decay else 3),
    )


def _flops(config: RunConfig, trace: Trace, tokens: int) -> float:
    rows, masked = tokens // config.data.length, round(tokens * trace.masked_share)
    return training_flops(trace.model, num_sequences=rows, length=config.data.length, num_rows=masked)


def _repeated(config: RunConfig) -> float:
    """Operations done by useful operations: full recomputation adds a third, the rest next to nothing."""
    return 4 / 3 if config.train.recompute == "full" else 1.0


def _wire(axis: str, trace: Trace, gpu: Gpu, gpus_per_node: int) -> float:
    return gpu.host_wire if axis == BETWEEN_DEVICES else gpu.bandwidth(*_spread(trace.axes[axis], gpus_per_node))


def _spread(ranks: tuple[int, ...], gpus_per_node: int) -> tuple[int, int]:
    """Over how many nodes an axis lies, and with how many ranks in each."""
    nodes = Counter(rank // gpus_per_node for rank in ranks)
    return len(nodes), max(nodes.values())
