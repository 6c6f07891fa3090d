"""A plan for people, and its numbers by dotted key."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pretrain.config import RunConfig

from .estimate import Plan
from .machines import find
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
        f"{config.name}: {held.num_parameters / 1e9:.2f}B parameters on {nodes} x {gpus_per_node} {gpu_name}, "
        f"{config.train.steps:,} steps of {tokens:,} tokens ({config.train.steps * tokens / 1e9:.1f}B)",
        style="bold",
    )
    yield _memory(plan)
    yield _time(plan, gpu_name)
    yield Text(
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.world:,.0f} per GPU "
        f"(MFU {plan.mfu:.0%}); {plan.days:,.1f} days; a checkpoint takes {plan.checkpoint_bytes / GIB:,.0f} GiB",
    )
    if held.kernels:
        yield Text(f"attention: {kernels_of(plan)}", style="dim")
    yield Text("Memory is counted from the run's own operators; times are predicted, not measured.", style="dim")
    if plan.fits:
        yield Text(f"fits: {plan.peak / GIB:.1f} of {plan.room / GIB:.1f} GiB", style="green")
    else:
        yield Text(f"does not fit: {plan.peak / GIB:.1f} GiB, there are {plan.room / GIB:.1f}", style="red")
    for hint in hints:
        yield Text(f"  try {hint}" if "=" in hint else f"  {hint}")


def kernels_of(plan: Plan) -> str:
    """What attends on the GPU, under which masks."""
    return "; ".join(f"{kernel} ({kinds})" for kinds, kernel in plan.trace.kernels.items())


def _memory(plan: Plan) -> Table:
    held = plan.trace
    table = Table(title="memory of a rank", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
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
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("peak, with what is computed meanwhile", f"{plan.peak / GIB:.2f}", style="bold")
    if held.host:
        table.add_row("peak on the host", f"{held.host / GIB:.2f}", style="bold")
    return table


def _time(plan: Plan, gpu_name: str) -> Table:
    gpu, held = find(gpu_name), plan.trace
    table = Table(title="a step", title_justify="left")
    for name in ("what", "amount"):
        table.add_column(name)
    table.add_column("seconds", justify="right")
    table.add_row(
        "computing",
        f"{plan.step_flops / 1e15:,.1f} useful PFLOP over all ranks, at {gpu.reached:.0%} of the peak",
        f"{plan.compute_seconds:.2f}",
    )
    for axis, seconds in plan.sending.items():
        whom = "over PCIe" if axis == BETWEEN_DEVICES else f"among {len(held.axes[axis])} ranks"
        table.add_row(f"sending: {axis}", f"{held.sent[axis] / GIB:.1f} GiB {whom}", f"{seconds:.2f}")
    traffic = f"memory traffic{' on the host' * bool(held.host)}"
    table.add_row("optimizer", traffic, f"{plan.optimizer_seconds:.2f}")
    table.add_row("step", "weights are sent beside the computing", f"{plan.step_seconds:.2f}", style="bold")
    return table
