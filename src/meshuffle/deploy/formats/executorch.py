"""ExecuTorch: a `.pte` for phones and small machines, executed by XNNPACK.

The metadata are methods of the program that return text.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from meshuffle.deploy.formats.base import Calibration, Format, Precision, Run

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from meshuffle.deploy.subject import Subject

_PREFIX = "meshuffle_"


class ExecuTorch(Format):
    """A program whose memory is planned for batches of up to 32; larger batches run in pieces."""

    name = "executorch"
    suffix = ".pte"
    packages: ClassVar[Mapping[str, str]] = {"executorch": "executorch", "torchao": "torchao"}
    extra = "executorch"
    max_batch = 32
    any_size = False

    def write(self, subject: Subject, path: Path) -> None:
        """Lower the captured program to XNNPACK, as far as it supports the ops."""
        path.write_bytes(_lowered(subject.program(self.max_batch), subject.metadata))

    def write_int8(self, subject: Subject, path: Path, calibration: Calibration) -> None:
        """Quantise with torchao for XNNPACK: weights per channel, activations per tensor."""
        import torch
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(
            get_symmetric_quantization_config(is_per_channel=True)
        )
        network = subject.plain or subject
        module = prepare_pt2e(network.program(self.max_batch).module(), quantizer)
        with torch.inference_mode():
            for x in calibration.inputs(self.max_batch):
                module(torch.from_numpy(x))
        quantised = subject.preprocessed(convert_pt2e(module))
        program = subject.captured(quantised, self.max_batch)
        path.write_bytes(_lowered(program, subject.metadata))

    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return the function that executes the program; `threads` applies to the whole process."""
        import torch

        with _quiet():
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

            if threads:
                _unsafe_reset_threadpool(threads)
            method = _program(path).load_method("forward")

        def run(x: NDArray[Any]) -> NDArray[np.float32]:
            (outputs,) = method.execute([torch.from_numpy(x)])
            copied: NDArray[np.float32] = outputs.numpy().copy()
            return copied

        return run

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the texts that the program's methods return."""
        program = _program(path)
        names = [name for name in program.method_names if name.startswith(_PREFIX)]
        texts = {name: program.load_method(name).execute([])[0] for name in names}
        return {name.removeprefix(_PREFIX): text for name, text in texts.items()}

    def runtime(self, path: Path) -> str:
        """Return ExecuTorch's version."""
        from importlib.metadata import version

        return f"ExecuTorch {version('executorch')}, XNNPACK"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the runtime writes about this CPU while it starts, unless `--debug` is on."""
    if os.environ.get("MESHUFFLE_DEBUG") == "1":
        yield
        return
    error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(error, 2)
        os.close(error)
        os.close(nowhere)


def _program(path: Path) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path)


def _lowered(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = copy.deepcopy(program)  # other formats share it
    _slice_for_split(program)
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        constant_methods={f"{_PREFIX}{key}": text for key, text in metadata.items()},
    )
    return bytes(edge.to_executorch().buffer)


def _slice_for_split(program: ExportedProgram) -> None:
    """Replace splits by slices: ExecuTorch 1.5 on torch 2.15 fixes the batch size at a split."""
    import torch

    aten: Any = torch.ops.aten
    splits = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
    for node in list(program.graph.nodes):
        if node.target in splits:
            _slice_one(node, aten.slice.Tensor)
    program.graph_module.recompile()


def _slice_one(node: Node, take: Any) -> None:
    graph, source = node.graph, node.args[0]
    dim: Any = node.args[2] if len(node.args) > 2 else 0
    ends = np.cumsum([part.shape[dim] for part in node.meta["val"]]).tolist()
    starts = [0, *ends]
    for user in list(node.users):
        i: Any = user.args[1]
        with graph.inserting_before(user):
            piece = graph.call_function(take, (source, dim, starts[i], ends[i]))
        piece.meta = dict(user.meta)
        user.replace_all_uses_with(piece)
        graph.erase_node(user)
    graph.erase_node(node)
