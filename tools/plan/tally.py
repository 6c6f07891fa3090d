"""What a step allocates and sends, read off its operators: live bytes of every device, bytes on every wire."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECEIVED = {
    "allgather_": lambda whole, n: whole * (n - 1) / n,
    "_allgather_base_": lambda whole, n: whole * (n - 1) / n,
    "allgather_into_tensor_coalesced_": lambda whole, n: whole * (n - 1) / n,
    "reduce_scatter_": lambda whole, n: whole * (n - 1) / n,
    "_reduce_scatter_base_": lambda whole, n: whole * (n - 1) / n,
    "reduce_scatter_tensor_coalesced_": lambda whole, n: whole * (n - 1) / n,
    "allreduce_": lambda whole, n: 2 * whole * (n - 1) / n,
    "allreduce_coalesced_": lambda whole, n: 2 * whole * (n - 1) / n,
    "broadcast_": lambda whole, n: whole,
    "alltoall_base_": lambda whole, n: whole * (n - 1) / n,
    "all_gather_into_tensor": lambda whole, n: whole * (n - 1) / n,
    "reduce_scatter_tensor": lambda whole, n: whole * (n - 1) / n,
    "all_reduce": lambda whole, n: 2 * whole * (n - 1) / n,
}
"""Bytes through each rank's wire in a ring, by collective, from the bytes of the whole (its largest tensor)."""
BETWEEN_DEVICES = "host"
"""The wire that copies from device to device take, where mesh axes are the others."""

COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
"""Operators that copy, and which of their arguments."""


class Tally(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        held: what is allocated already.
        axes: the mesh axis of every process group, by the group's name.
    """

    def __init__(self, held: Iterable[Tensor], axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.bytes: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self.sizes: dict[int, int] = {}
        self.devices: dict[int, torch.device] = {}
        self.sent: dict[str, float] = defaultdict(float)
        for tensor in held:
            self._count(tensor)

    def __enter__(self) -> Self:
        """Also sees storages that FSDP empties and fills again."""
        self.resize = resize = torch.UntypedStorage.resize_
        tally = self

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tally._changed(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        if operator.namespace in ("c10d", "_c10d_functional"):
            self._send(operator, args, out)
        elif operator in COPIES:
            self._copy(args[COPIES[operator]], out)
        return out

    def _count(self, tensor: Tensor) -> None:
        local = _local(tensor)
        storage = local.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key], self.devices[key] = 0, local.device
            self._changed(key, storage.nbytes())
            weakref.finalize(storage, self._gone, key)

    def _changed(self, key: int, size: int) -> None:
        if key in self.sizes:
            device = self.devices[key]
            self.bytes[device] += size - self.sizes[key]
            self.sizes[key] = size
            self.peak[device] = max(self.peak[device], self.bytes[device])

    def _gone(self, key: int) -> None:
        self.bytes[self.devices.pop(key)] -= self.sizes.pop(key)

    def _copy(self, source: Tensor, out: Tensor) -> None:
        source, out = _local(source), _local(out)
        if source.device != out.device:
            self.sent[BETWEEN_DEVICES] += source.numel() * source.element_size()

    def _send(self, operator: Any, args: tuple[Any, ...], out: Any) -> None:
        name = operator.overloadpacket.__name__
        received = RECEIVED.get(name)
        group = next((found for arg in args if (found := _group_name(arg)) in self.axes), None)
        if received is None or group is None:
            return
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        whole = max((t.numel() * t.element_size() for t in tensors), default=0)
        size = dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
        self.sent[self.axes[group]] += received(whole, size)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _group_name(argument: Any) -> str | None:
    """The name of a process group among an operator's arguments: its own, or of the object that holds it."""
    if isinstance(argument, str):
        return argument
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return str(dist.ProcessGroup.unbox(argument).group_name)
    return None
