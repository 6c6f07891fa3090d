"""What a step allocates and sends, read off its operators: live bytes at every moment, bytes on every mesh axis."""

import weakref
from collections import defaultdict
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


class Tally(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        held: what is allocated already.
        axes: the mesh axis of every process group, by the group's name.
    """

    def __init__(self, held: Iterable[Tensor], axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.bytes = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.storages: dict[int, Any] = {}
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
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self._changed(key, storage.nbytes(), new=True)
            weakref.finalize(storage, self._gone, key)

    def _changed(self, key: int, size: int, *, new: bool = False) -> None:
        if new or key in self.sizes:
            self.bytes += size - self.sizes.get(key, 0)
            self.sizes[key] = size
            self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key, 0)

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


def _group_name(argument: Any) -> str | None:
    """The name of a process group among an operator's arguments: its own, or of the object that holds it."""
    if isinstance(argument, str):
        return argument
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return str(dist.ProcessGroup.unbox(argument).group_name)
    return None
