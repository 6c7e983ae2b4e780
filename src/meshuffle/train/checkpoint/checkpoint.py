"""The state of a run, from which it continues bit for bit.

`state/` holds folders `step-00001200/`, each a torch Distributed Checkpoint whose tensors carry
the model's own names, a `meta.json`, and the checksums of these files. A folder is written under a
temporary name, synced and renamed, so one with its final name was whole; the two newest are kept.
What happened to it since is for `intact.py` to find.

Reading runs no code: Distributed Checkpoint keeps its index as a pickle, which is read here by
an unpickler that knows the index's own classes and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from meshuffle.errors import RunError
from meshuffle.files import disk_errors, sync, write_json
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.parts import gather_named
from meshuffle.parallel.ranks import Ranks
from meshuffle.train.checkpoint.checksums import write_checksums

META = "meta.json"
_KEPT = 2
_BEFORE = ".before"  # what a folder of the same step is called while the new one takes its place
_NAME = re.compile(r"step-(\d+)(\.before)?")
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    (_METADATA, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}

# Each rank's state is the whole, and no process group is in use. Said here and not around the call:
# filters are the process's, and the call is made beside the loop's thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def save_checkpoint(state: Path, step: int, tensors: Mapping[str, Tensor], meta: Any) -> Path:
    """Write `tensors` and `meta` (plain JSON) as the checkpoint of `step`; returns its folder.

    Raises:
        MeshuffleError: the disk does not take it; older checkpoints are as they were.
    """
    with disk_errors(state.parent, dcp.CheckpointException):
        return _save(state, step, tensors, meta)


def _save(state: Path, step: int, tensors: Mapping[str, Tensor], meta: Any) -> Path:
    final = state / f"step-{step:08d}"
    temporary = state / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        writer = dcp.FileSystemWriter(temporary, sync_files=True)
        plain = {name: tensor.detach() for name, tensor in tensors.items()}
        dcp.save(plain, storage_writer=writer, no_dist=True)
        write_json(temporary / META, {"step": step, **meta, "checksums": True})
        write_checksums(temporary)
        before = state / f"{final.name}{_BEFORE}"
        if final.exists():  # a folder that is not empty cannot be replaced in one move
            shutil.rmtree(before, ignore_errors=True)
            final.replace(before)
        temporary.replace(final)
        sync(state)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
    for old in checkpoints(state)[_KEPT:]:
        shutil.rmtree(old)
    return final


def checkpoints(state: Path) -> list[Path]:
    """Return the folders of checkpoints in `state`, the newest first."""
    found = [
        (int(match[1]), match[2] is None, path)
        for path in state.glob("step-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def resume_command(run: Path) -> str:
    """Return the command that continues `run`."""
    return f"meshuffle train --resume {shlex.quote(str(run))}"


def recovery_hint(run: Path) -> str:
    """Return how to go on with a run that has failed."""
    found = checkpoints(run / "state")
    step = int(_NAME.fullmatch(found[0].name)[1]) if found else None  # type: ignore[index]
    where = "start again" if step is None else f"continue from step {step}, the last checkpoint,"
    return f"{where} with: {resume_command(run)}"


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the meta data of a checkpoint.

    Raises:
        RunError: it cannot be read.
    """
    try:
        meta = dict(json.loads((folder / META).read_text()))
        reader = _SafeReader(folder)
        tensors: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    # A pickle that is not one raises anything, and CheckpointException is no Exception.
    except (Exception, dcp.CheckpointException) as failed:  # noqa: BLE001
        first = next(iter(getattr(failed, "failures", {}).values()), (failed, None))[0]
        reason = str(first).partition("\n")[0] or type(first).__name__
        raise RunError(f"{folder}: cannot be read ({reason})") from None
    return tensors, meta


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes of the checkpoint's index, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class, or raise for a name that no index holds."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint needs")


class _SafeReader(dcp.FileSystemReader):
    """Distributed Checkpoint's reader with the index read as above."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the checkpoint's index."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as `optim.PARAMETER.KEY`, this rank's part of it."""
    return {
        f"optim.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def whole_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    ranks: Ranks | None = None,
    everywhere: bool = False,
) -> dict[str, Tensor]:
    """Return tensors of a checkpoint whole, of which a split model has parts.

    All ranks of a replica call it; the first has all of them then.

    Args:
        ranks: where the model is split.
        everywhere: let the ranks of other pipeline stages have all of them too.
    """
    if not isinstance(model, Parallel) or ranks is None:
        return dict(tensors)
    whole = {
        name: model.whole(_owner(name), part) if part.ndim else part
        for name, part in tensors.items()
    }
    if ranks.pp_world == 1 or not (everywhere or ranks.tp_rank == 0):
        return whole
    return gather_named(whole, ranks.pp, everywhere=everywhere)


def own_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's parts of whole tensors of a checkpoint.

    Raises:
        RuntimeError: one does not have the size of the model's.
    """
    if not isinstance(model, Parallel):
        return dict(tensors)
    return {
        name: model.part_of(_owner(name), whole) if whole.ndim else whole
        for name, whole in tensors.items()
        if _owner(name) not in model.stages_of or model.has(_owner(name))
    }


def _owner(name: str) -> str:
    """Return the parameter or buffer that a checkpoint's tensor belongs to.

    >>> _owner("ema.module.fc.weight"), _owner("optim.fc.weight.exp_avg")
    ('fc.weight', 'fc.weight')
    """
    kind, _, rest = name.partition(".")
    return rest.rpartition(".")[0] if kind == "optim" else rest.removeprefix("module.")


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    keeps: Callable[[nn.Parameter], bool] = lambda _: True,
) -> None:
    """Put back what `optimizer_tensors` returned, of the parameters whose state this rank keeps.

    The momentum of parameters that were frozen until now is 0, which is where SGD begins: its fused
    kernel does not take some with and some without.
    """
    trained = {p for group in optimizer.param_groups for p in group["params"] if keeps(p)}
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        state = {
            k.removeprefix(prefix): _like(v, parameter)
            for k, v in tensors.items()
            if k.startswith(prefix) and "." not in k.removeprefix(prefix)
        }
        if state and parameter in trained:
            optimizer.state[parameter] = state
    has_momentum = any("momentum_buffer" in state for state in optimizer.state.values())
    for parameter in trained if has_momentum else ():
        if parameter not in optimizer.state:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return `value` on the parameter's device and, at its shape, in its memory format.

    The fused optimisers walk parameter and state in memory order, so the formats must agree.
    """
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device, copy=True)


@contextmanager
def locked(run: Path) -> Iterator[list[str]]:
    """Hold the run folder for this process; the lock goes with the process, however it ends.

    Yields lines for the user: one where the file system or the operating system has no locks.

    Raises:
        RunError: another process holds it, or the lock fails.
    """
    with (run / ".lock").open("w") as file:
        if reason := _lock(run, file):
            yield [f"{run} cannot be locked ({reason}): let no other process train in it"]
            return
        for left in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp")]:  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield []


def _lock(run: Path, file: IO[str]) -> str:
    """Lock `file`; returns why that is not possible here, or ""."""
    try:
        import fcntl
    except ImportError:  # Windows
        return "this system has no file locks"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise RunError(f"{run}: another process is training in it") from None
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            return str(error.strerror)
        raise RunError(f"{run}: cannot be locked: {error.strerror}") from None
    return ""
