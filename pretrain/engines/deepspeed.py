"""DeepSpeed ZeRO: its own partitioning, accumulation, clipping and stepping behind the protocol of the loop."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import Batch
from model.config import ModelConfig
from model.corruption import Corruption
from model.diffusion import LossTerms, MaskedDiffusion, StepSchedule
from model.initialisation import initialise
from model.transformer import use_attention

from ..config import OptimConfig, ParallelConfig, TrainConfig
from ..ema import Ema
from ..freeze import freeze
from ..optim import MOMENTS, adamw, allocate_state
from ..parallel.blocks import prepare_blocks
from ..parallel.mesh import Mesh
from .base import Micro, Span, Tensors, unmeasured
from .zero import hide_gathering, partitions
from .zero_setup import import_deepspeed, initialise_quietly, materialise, zero_settings
from .zero_state import NamedState, whole_of

USED_ELSEWHERE = r"denoiser\.(embed|head)\.weight|latent\.recognition\.mark\.weight|augmentation\.gate"
"""Parameters that meet their inputs outside the forward of the module that holds them."""


class Entry(nn.Module):
    """The training entry as ZeRO-3 wants it: it finds the tensors of a tuple, and overlooks those of a dataclass."""

    def __init__(self, model: MaskedDiffusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, corruption: Corruption, step: StepSchedule) -> tuple[Tensor, LossTerms]:
        """The differentiable loss, and all terms detached."""
        terms: LossTerms = self.model(batch, corruption, step=step)
        return terms.loss, replace(terms, loss=terms.loss.detach())


class DeepSpeedEngine:
    """Stages 1 (optimizer state), 2 (gradients too) and 3 (weights too) over the data axis.

    Float32 masters, moments and averages lie in flat partitions; see NamedState for how they get their names.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        *,
        seed: int,
    ) -> None:
        deepspeed = import_deepspeed(mesh.device)
        self.mesh = mesh
        self.span: Span = unmeasured
        self.products = _gathered_products if parallel.zero_stage == 3 else nullcontext
        with torch.device("meta"):
            whole = MaskedDiffusion(model)
        use_attention(whole, train.attention, mesh.device)
        freeze(whole, train.freeze)
        prepare_blocks(whole, recompute=train.recompute, compile_blocks=train.compile)
        shapes = {name: p.shape for name, p in whole.named_parameters()}
        settings = zero_settings(train, parallel, mesh)
        materialise(whole, settings, mesh.device, deepspeed)
        self.parameters = dict(whole.named_parameters())
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.num_parameters = sum(shape.numel() for shape in shapes.values())
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        matrices, vectors = (
            [p for name, p in trained.items() if (len(shapes[name]) >= 2) == wanted] for wanted in (True, False)
        )
        self.engine = initialise_quietly(Entry(whole), adamw(matrices, vectors, optim), settings, deepspeed)
        if parallel.zero_stage == 3:
            hide_gathering(self.engine.optimizer)
            for name, parameter in self.parameters.items():
                if re.fullmatch(USED_ELSEWHERE, name):
                    deepspeed.zero.register_external_parameter(self.engine.module, parameter)
        self.zero = partitions(self.engine.optimizer)
        self.named = NamedState(mesh, shapes, {name: self.zero.fragment(p) for name, p in trained.items()})
        self.frozen = {name: self.named.blank(name).cpu() for name in self.parameters if name not in trained}
        allocate_state(self.engine.optimizer.optimizer, self.zero.masters)
        initialise(whole, seed, num_layers=model.backbone.num_layers, opened=self._opened)
        self.zero.refresh()
        masters = {str(n): master for n, master in enumerate(self.zero.masters)}
        self.average = Ema(masters) if train.ema_decay else None

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """See Engine."""
        self.engine.train()
        self.engine.set_gradient_accumulation_boundary(last)
        with self.products():
            with self.span("forward"):
                loss, terms = self._forward(micro)
            with self.span("backward"):
                self.engine.backward(loss * (scale * self.mesh.data.size), scale_wrt_gas=False)
        return terms

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> LossTerms:
        """See Engine."""
        self.engine.eval()
        with self.products():
            return self._forward(micro)[1]

    @torch.no_grad()
    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine; gradients are reduced since the backward pass, and are clipped in the step."""
        self.engine.optimizer.clip_grad = max_norm
        return self.zero.norm().to(self.mesh.device)

    def step(self, *, lr: float, take: Tensor) -> None:
        """See Engine; waits for the device, as DeepSpeed does when it clips."""
        if not bool(take):
            self.zero.discard()
            return
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def update_ema(self, decay: float, *, take: Tensor) -> None:
        """See Engine."""
        if self.average is not None:
            self.average.update(decay, take.to(self.zero.masters[0].device))

    @contextmanager
    def ema(self) -> Iterator[None]:
        """See Engine."""
        if self.average is None:
            yield
            return
        try:
            with self.average.swapped():
                self.zero.refresh()
                yield
        finally:
            self.zero.refresh()

    @torch.no_grad()
    def state_dict(self) -> Tensors:
        """See Engine; copies in host memory, which load_state_dict takes back."""
        tensors: Tensors = {}
        for group, flats in self._flats().items():
            tensors[group] = {name: self.named.read(flats, name) for name in self.named.fragments}
            if group not in MOMENTS:
                tensors[group] |= self.frozen
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """See Engine."""
        for group, flats in self._flats().items():
            for name in self.named.fragments:
                self.named.write(flats, name, tensors[group][name])
        for name in self.frozen:
            self._set_frozen(name, tensors["model"][name])
        for state in self.engine.optimizer.state.values():
            state["step"].fill_(num_updates)
        self.zero.refresh()

    def _flats(self) -> dict[str, list[Tensor]]:
        """The flat partitions of every group of a checkpoint."""
        masters, state = self.zero.masters, self.engine.optimizer.state
        flats = {"model": list(masters), **{moment: [state[m][moment] for m in masters] for moment in MOMENTS}}
        if self.average is not None:
            flats["ema"] = list(self.average.shadow.values())
        return flats

    @contextmanager
    def _opened(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """A named tensor, to be filled in the parameter's stead: masters get it unrounded."""
        name = self.names[parameter]
        weight = self.named.blank(name)
        yield weight
        if name in self.frozen:
            self._set_frozen(name, weight)
        else:
            self.named.write(self.zero.masters, name, weight)

    def _set_frozen(self, name: str, value: Tensor) -> None:
        self.frozen[name].copy_(value)
        self.zero.set_frozen(self.parameters[name], whole_of(value.to(self.mesh.device)))

    def _forward(self, micro: Micro) -> tuple[Tensor, LossTerms]:
        micro = micro.to(self.mesh.device)
        found: tuple[Tensor, LossTerms] = self.engine(micro.batch, micro.corruption, micro.step)
        return found


@contextmanager
def _gathered_products() -> Iterator[None]:
    """Within it a linear layer's graph holds on to the parameter itself, not to what is gathered of it for now.

    DeepSpeed makes this replacement for good and everywhere; here it lasts as long as its own model computes.
    """
    plain, product = F.linear, _product()
    F.linear = lambda x, weight, bias=None: product.apply(x, weight, bias)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = plain


@cache
def _product() -> type[torch.autograd.Function]:
    """DeepSpeed's linear layer with PyTorch's way forward, since its own adds the bias in a step of its own, in place.

    That rounds twice in bfloat16, and spoils the products that selective recomputation keeps.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    plain = F.linear

    class Product(LinearFunctionForZeroStage3):
        @staticmethod
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return plain(x, weight, bias)

    return Product
