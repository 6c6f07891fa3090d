"""`penumbra plan`: will it fit, how fast could it be, and for how long; on a laptop, before anything is rented."""

from functools import partial
from pathlib import Path

from rich.console import Console

from eval.record import Record
from pretrain.config import RunConfig
from pretrain.writable import check_writable

from .estimate import Plan, estimate
from .machines import FILLED, find
from .page import as_lines, kernels_of, results_of
from .suggest import suggestions
from .trace import trace


def run_plan(config: RunConfig, gpu_name: str, *, nodes: int, gpus_per_node: int, json_file: Path | None) -> Plan:
    """Plans a run, prints the plan, and writes the record where asked.

    Raises:
        ValueError: an unknown GPU, an engine that can not be planned, or processes that can not divide the run.
    """
    check_writable(json_file)
    gpu = find(gpu_name)
    if config.engine != "fsdp":
        alike = (
            "which shards as ZeRO-3 does; ZeRO-1 and 2 hold more"
            if config.engine == "deepspeed"
            else "whose parallel.tensor divides the same matrices, and which shards the weights as well"
        )
        raise ValueError(f"engine={config.engine} can not be planned, only engine=fsdp, {alike}")
    settings = {"recipe": config.name, "gpu": gpu_name, "nodes": nodes, "gpus_per_node": gpus_per_node}
    assumed = {"reached_share_of_peak": gpu.reached, "filled_share_of_memory": FILLED}
    record = Record({**settings, **assumed})
    planner = partial(_plan, gpu_name=gpu_name, nodes=nodes, gpus_per_node=gpus_per_node)
    plan = planner(config)
    record.settings = {**record.settings, "attention": kernels_of(plan)}
    hints = [] if plan.fits else suggestions(config, planner)
    console = Console()
    for line in as_lines(config, plan, gpu_name, nodes=nodes, gpus_per_node=gpus_per_node, hints=hints):
        console.print(line)
    record.write(results_of(plan), json_file)
    return plan


def _plan(config: RunConfig, *, gpu_name: str, nodes: int, gpus_per_node: int) -> Plan:
    traced = trace(config, nodes * gpus_per_node)
    return estimate(config, traced, find(gpu_name), nodes=nodes, gpus_per_node=gpus_per_node)
