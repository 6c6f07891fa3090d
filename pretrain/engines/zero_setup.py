"""How a model comes under DeepSpeed: the import, its settings, and weights that are partitioned as they are made."""

import contextlib
import io
import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config import ParallelConfig, TrainConfig
from ..parallel.mesh import Mesh

Settings = dict[str, Any]
GATHERING: Settings = {}
"""Of stage 3, what differs from DeepSpeed's defaults: when parameters are gathered ahead, kept, and let go."""


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, bound to this process's groups, one of its own included where there are none.

    Raises:
        ValueError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ValueError(
            "engine=deepspeed needs DeepSpeed: pip install penumbra-diffusion[deepspeed], or set engine=fsdp"
        ) from None
    import deepspeed.comm
    from deepspeed.utils import groups

    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, for CPUs only
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if groups._WORLD_GROUP not in (None, *dist.distributed_c10d._world.pg_map):
        groups._release_process_group_references()  # of an earlier run in this process
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def zero_settings(train: TrainConfig, parallel: ParallelConfig, mesh: Mesh) -> Settings:
    """What DeepSpeed reads from a file: all of ZeRO, nothing of the loop."""
    zero: Settings = {"stage": parallel.zero_stage, "memory_efficient_linear": False, **GATHERING}
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": train.clip_norm,
        "bf16": {"enabled": train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def materialise(model: nn.Module, settings: Settings, device: torch.device, deepspeed: ModuleType) -> None:
    """Zeros instead of parameters on the meta device, in the precision of the computation, one at a time.

    Under stage 3 a process keeps its part of each, so that none ever holds the whole model.
    """
    dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(parameter.shape, dtype=dtype, device=device)
            made = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
            if settings["zero_optimization"]["stage"] == 3:
                deepspeed.zero.Init(module=nn.ParameterList([made]), config_dict_or_path=settings)
            setattr(module, name, made)


def initialise_quietly(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, deepspeed: ModuleType
) -> Any:
    """The engine of deepspeed.initialize, without the memory tables that it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
