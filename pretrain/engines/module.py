"""What engines share whose model is a module of parameters, each with its moments and average beside it."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.diffusion import LossTerms, MaskedDiffusion

from ..config import OptimConfig, TrainConfig
from ..ema import Ema
from ..optim import MOMENTS, make_optimizer, optimizer_step
from ..parallel.gradient_sum import GradientSum
from ..parallel.mesh import Mesh
from .base import Micro, Span, Tensors, unmeasured


class ModuleEngine:
    """Passes, clipping, stepping, averages and state of an initialised model; how it is divided is a subclass's.

    Args:
        autocast: whether to compute in bfloat16 over float32 weights.
        divided: names of the parameters of which the processes of the tensor axis hold different parts.
        replicas: processes that hold the same parts of the weights and add their gradients up; None: this one alone.
        parts: groups over which squares of gradients add up to those of the whole model, one after the other.
    """

    def __init__(
        self,
        model: MaskedDiffusion,
        mesh: Mesh,
        optim: OptimConfig,
        train: TrainConfig,
        *,
        autocast: bool,
        divided: Collection[str],
        replicas: dist.ProcessGroup | None,
        parts: Sequence[dist.ProcessGroup],
    ) -> None:
        self.model, self.mesh, self.autocast, self.parts = model, mesh, autocast, parts
        self.span: Span = unmeasured
        self.divided = frozenset(divided)
        self.parameters = dict(model.named_parameters())
        self.held = next(iter(self.parameters.values())).device
        self.num_parameters = sum(p.numel() for p in self.parameters.values())
        self.optimizer = make_optimizer(self.parameters.values(), optim)
        self.average = Ema(self.parameters) if train.ema_decay else None
        self.sum = None if replicas is None else GradientSum(self.parameters.values(), replicas)

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """See Engine."""
        self.model.train()
        if self.sum is not None:
            self.sum.expect(last=last)
        with self.span("forward"):
            terms = self._forward(micro)
        with self.span("backward"):
            (terms.loss * scale).backward()
        return replace(terms, loss=terms.loss.detach())

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> LossTerms:
        """See Engine."""
        self.model.eval()
        return self._forward(micro)

    @torch.no_grad()
    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine.

        Every process of a replica adds its part of what is divided and its share of what is not, and gets the same
        bits back, so that all take the step or none does.
        """
        if self.sum is not None:
            self.sum.finish()
        gradients = {name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        divided = [gradient for name, gradient in gradients.items() if name in self.divided]
        whole = [gradient for name, gradient in gradients.items() if name not in self.divided]
        square = self._square(divided) + self._square(whole) / self.mesh.tensor.size
        for group in self.parts:
            dist.all_reduce(square, group=group)
        norm = square.sqrt()
        torch._foreach_mul_([*divided, *whole], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.to(self.mesh.device)

    def step(self, *, lr: float, take: Tensor) -> None:
        """See Engine."""
        optimizer_step(self.optimizer, lr=lr, take=take.to(self.held))
        self.optimizer.zero_grad(set_to_none=True)

    def update_ema(self, decay: float, *, take: Tensor) -> None:
        """See Engine."""
        if self.average is not None:
            self.average.update(decay, take.to(self.held))

    def ema(self) -> AbstractContextManager[None]:
        """See Engine."""
        return nullcontext() if self.average is None else self.average.swapped()

    def state_dict(self) -> Tensors:
        """See Engine."""
        named = self.parameters
        tensors: Tensors = {"model": {name: p.detach() for name, p in named.items()}}
        for moment in MOMENTS:
            tensors[moment] = {name: self.optimizer.state[p][moment] for name, p in named.items() if p.requires_grad}
        if self.average is not None:
            tensors["ema"] = self.average.shadow
        return {group: {name: self._canonical(name, t) for name, t in ts.items()} for group, ts in tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """See Engine; the tensors lie as those of `state_dict` do."""
        for group, named in self.state_dict().items():
            for name, tensor in named.items():
                if tensor is not tensors[group][name]:
                    local_part(tensor).copy_(local_part(tensors[group][name]))
        for state in self.optimizer.state.values():
            state["step"].fill_(num_updates)

    def _canonical(self, name: str, held: Tensor) -> Tensor:
        """What this process holds of a tensor as the part that it is, on the same memory."""
        return held

    def _forward(self, micro: Micro) -> LossTerms:
        micro = micro.to(self.mesh.device)
        device = self.mesh.device.type
        with torch.autocast(device, dtype=torch.bfloat16) if self.autocast else nullcontext():
            terms: LossTerms = self.model(micro.batch, micro.corruption, step=micro.step)
        return terms

    def _square(self, gradients: list[Tensor]) -> Tensor:
        held = [g for g in gradients if g.numel()]
        if not held:
            return torch.zeros((), device=self.held)
        return torch.stack(torch._foreach_norm(held)).square().sum()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_on_axis(parameter: Tensor, axis: str) -> bool:
    """Whether an axis of the mesh divides a parameter, rather than every process of that axis holding it."""
    return isinstance(parameter, DTensor) and axis in (parameter.device_mesh.mesh_dim_names or ())
