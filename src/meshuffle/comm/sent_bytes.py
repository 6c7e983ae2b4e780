"""Bytes that really leave this rank, counted where torch hands tensors to a process group.

A dispatch mode over c10d: it reads the sizes of actual tensors and knows nothing of any Plan, so
that predictions can be compared with it. Costs are those of the ring and of the direct algorithms,
whatever the backend does; R ranks, b bytes of this rank's input:

    all-reduce        2 (R − 1)/R · b      the ring's reduce-scatter and all-gather
    reduce-scatter      (R − 1)/R · b
    all-gather          (R − 1) · b
    all-to-all        what is for others
    broadcast, reduce   (R − 1)/R · b      so that all ranks together count (R − 1) · b
    send                b                  to one other rank
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from meshuffle.errors import MeshuffleError

_label = ["values"]


@contextmanager
def labelled(name: str) -> Iterator[None]:
    """Count what is sent inside under `name`; parameter gradients are `"parameters"`."""
    _label.append(name)
    try:
        yield
    finally:
        _label.pop()


class SentBytes(TorchDispatchMode):
    """Counts bytes that this rank sends inside a `with` block, forward and backward.

    Attributes:
        by_label: exact bytes by `labelled` name; `"values"` outside of any.
        calls: number of collectives, by the name of the op.

    Raises:
        MeshuffleError: a collective whose cost is not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_label: defaultdict[str, Fraction] = defaultdict(Fraction)
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> Fraction:
        """All labels together."""
        return sum(self.by_label.values(), Fraction(0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Count the op if it is a collective, and run it."""
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname.rstrip("_")
            if name not in _FREE:
                self._count(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, name: str, func: Any, args: Sequence[Any], kwargs: Any) -> None:
        if name not in _COSTS:
            raise MeshuffleError(f"no cost is known for the collective {func}")
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        group = _group_of(given)
        cost = _COSTS[name](given, dist.get_rank(group), dist.get_world_size(group))
        self.by_label[_label[-1]] += cost
        self.calls[name] += 1


def _group_of(given: dict[str, Any]) -> dist.ProcessGroup:
    if "group_name" in given:
        name = given["group_name"]
        return dist.distributed_c10d._resolve_process_group(name)
    return dist.ProcessGroup.unbox(given["process_group"])


Cost = Callable[[dict[str, Any], int, int], Fraction]


_INPUT_NAMES = ("input_tensors", "input_tensor", "input", "inputs", "tensors", "self")


def _input_bytes(given: dict[str, Any]) -> int:
    """Return the bytes of a call's input, whatever its schema calls it."""
    value = next(given[name] for name in _INPUT_NAMES if name in given)
    return sum(x.numel() * x.itemsize for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def _share(factor: int) -> Cost:
    return lambda given, _, world: Fraction(factor * (world - 1) * _input_bytes(given), world)


def _to_all_others(given: dict[str, Any], _: int, world: int) -> Fraction:
    return Fraction((world - 1) * _input_bytes(given))


def _all_to_all(given: dict[str, Any], rank: int, world: int) -> Fraction:
    x = given["input"]
    splits = given.get("input_split_sizes") or [x.shape[0] // world] * world
    row_bytes = x.itemsize * (x.numel() // x.shape[0] if x.shape[0] else 0)
    return Fraction(row_bytes * (sum(splits) - splits[rank]))


_COSTS: dict[str, Cost] = {
    "allreduce": _share(2),
    "all_reduce": _share(2),
    "all_reduce_coalesced": _share(2),
    "reduce_scatter_tensor": _share(1),
    "_reduce_scatter_base": _share(1),
    "broadcast": _share(1),
    "reduce": _share(1),
    "all_gather_into_tensor": _to_all_others,
    "_allgather_base": _to_all_others,
    "allgather": _to_all_others,
    "send": lambda given, *_: Fraction(_input_bytes(given)),
    "all_to_all_single": _all_to_all,
    "alltoall_base": _all_to_all,
}
_FREE = frozenset({"wait_tensor", "_wrap_tensor_autograd", "barrier", "recv"})
