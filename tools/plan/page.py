"""A plan for people, and its numbers by dotted key."""

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pretrain.config import RunConfig

from .estimate import Plan
from .machines import FILLED, find
from .tally import BETWEEN_DEVICES

GIB = 2**30


def results_of(plan: Plan) -> dict[str, float]:
    """The plan's numbers."""
    held = plan.trace
    return {
        "plan.fits": float(plan.fits),
        "plan.peak_gib": plan.peak / GIB,
        "plan.room_gib": plan.room / GIB,
        "plan.host_gib": held.host / GIB,
        "plan.parameters_gib": held.parameters / GIB,
        "plan.optimizer_gib": held.optimizer / GIB,
        "plan.gradients_gib": held.gradients / GIB,
        "plan.accumulated_gib": held.accumulated / GIB,
        "plan.activations_gib": held.activations / GIB,
        "plan.step_pflop": plan.step_flops / 1e15,
        "plan.step_seconds": plan.step_seconds,
        "plan.compute_seconds": plan.compute_seconds,
        **{f"plan.{axis}.sent_gib": sent / GIB for axis, sent in held.sent.items()},
        **{f"plan.{axis}.seconds": seconds for axis, seconds in plan.sending.items()},
        "plan.tokens_per_second_per_gpu": plan.tokens_per_second / plan.world,
        "plan.mfu": plan.mfu,
        "plan.days": plan.days,
        "plan.checkpoint_gib": plan.checkpoint_bytes / GIB,
    }


def as_lines(
    config: RunConfig, plan: Plan, gpu_name: str, *, nodes: int, gpus_per_node: int, hints: Sequence[str]
) -> Iterator[RenderableType]:
    """What the terminal shows."""
    held, tokens = plan.trace, config.train.batch_tokens
    yield Text(
        f"{config.name}: {_count(held.num_parameters)} parameters on {nodes} x {gpus_per_node} {gpu_name}, "
        f"{config.train.steps:,} steps of {tokens:,} tokens ({_count(config.train.steps * tokens)})",
        style="bold",
    )
    yield _memory(plan)
    yield _time(plan, gpu_name)
    yield Text(
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.world:,.0f} per GPU "
        f"(MFU {plan.mfu:.0%}); {_duration(86_400 * plan.days)}; a checkpoint takes {_size(plan.checkpoint_bytes)}",
    )
    if held.kernels:
        yield Text(f"attention: {kernels_of(plan)}", style="dim")
    yield Text("Memory is counted from the run's own operators; times are predicted, not measured.", style="dim")
    if plan.fits:
        yield Text(f"fits: {_size(plan.peak)} of {_room(plan)}", style="green")
    else:
        yield Text(f"does not fit: {_size(plan.peak)}, there are {_room(plan)}", style="red")
    for hint in hints:
        yield Text(f"  try {hint}" if "=" in hint else f"  {hint}")


def kernels_of(plan: Plan) -> str:
    """What attends on the GPU, under which masks."""
    return "; ".join(f"{kernel} ({kinds})" for kinds, kernel in plan.trace.kernels.items())


def _memory(plan: Plan) -> Table:
    held = plan.trace
    table = Table(title="memory of a rank", title_justify="left")
    table.add_column("what")
    table.add_column("amount", justify="right")
    where = "on the host: " if held.host else ""
    parts = {
        f"{where}weights, float32": held.parameters,
        f"{where}optimizer (and average)": held.optimizer,
        f"{where}gradients": held.gradients,
        f"whole gradients between {held.num_micros} micro-batches": held.accumulated,
        f"what a pass over {held.micro_rows} row{'s' * (held.micro_rows > 1)} keeps": held.activations,
    }
    for name, size in parts.items():
        if size:
            table.add_row(name, _size(size))
    table.add_row("peak: the most of it at one moment, and temporaries", _size(plan.peak), style="bold")
    if held.host:
        table.add_row("peak on the host", _size(held.host), style="bold")
    return table


def _time(plan: Plan, gpu_name: str) -> Table:
    gpu, held = find(gpu_name), plan.trace
    table = Table(title="a step", title_justify="left")
    for name in ("what", "amount"):
        table.add_column(name)
    table.add_column("time", justify="right")
    table.add_row(
        "computing",
        f"{_flops(plan.step_flops)} over all ranks, those recomputed besides, at {gpu.reached:.0%} of the peak",
        _duration(plan.compute_seconds),
    )
    for axis, seconds in plan.sending.items():
        whom = "over PCIe" if axis == BETWEEN_DEVICES else f"among {len(held.axes[axis])} ranks"
        table.add_row(f"sending: {axis}", f"{_size(held.sent[axis])} {whom}", _duration(seconds))
    traffic = f"memory traffic{' on the host' * bool(held.host)}"
    table.add_row("optimizer", traffic, _duration(plan.optimizer_seconds))
    table.add_row("step", "weights are sent beside the computing", _duration(plan.step_seconds), style="bold")
    return table


def _room(plan: Plan) -> str:
    return f"{_size(plan.room)} ({FILLED:.0%} of the GPU's)"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"


def _count(number: float) -> str:
    return "{:,.2f}{}".format(*_scaled(number, "kMBTP"))


def _flops(number: float) -> str:
    return "{:,.2f} {}FLOP".format(*_scaled(number, "kMGTP"))


def _scaled(number: float, prefixes: str) -> tuple[float, str]:
    """A number in the largest unit of which there is a whole one."""
    power = min(len(prefixes), int(math.log10(max(1.0, number))) // 3)
    return number / 1000**power, prefixes[power - 1] if power else ""


def _duration(seconds: float) -> str:
    for length, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= length:
            return f"{seconds / length:,.2f} {unit}"
    return f"{1000 * seconds:,.2f} ms"
