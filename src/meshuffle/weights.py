"""Weights and the card that travels with them, in one safetensors file.

The card (JSON in the file's metadata) says which model the tensors belong to, its classes and
its preprocessing: all that `eval`, `predict`, `export` and `serve` need. Reading it runs no
code; a model named `package.module:function` is rebuilt only when the caller repeats the name.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meshuffle.data.base import shortened
from meshuffle.data.entries import split_options
from meshuffle.errors import ConfigError, ModelError, RunError, did_you_mean
from meshuffle.files import disk_errors, replaced
from meshuffle.models.foreign import below, kind_of, left_out, read_torch
from meshuffle.models.given import PREFIX
from meshuffle.models.pretrained import FILES, saved_pretrained
from meshuffle.models.published import recognise, unwrap
from meshuffle.models.registry import is_foreign
from meshuffle.models.unfilled import Unfilled
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card

_KEY = "meshuffle"
_HUB = "torchvision:"
_JOIN = (
    "the weights are in parts; join them in Python: import glob; from {} import {} as load, {} as "
    "save; f = {!r}; parts = map(load, glob.glob(f + '/*-of-*{}')); "
    "save({{k: v for part in parts for k, v in part.items()}}, f + '/{}')"
)
_JOINED = ".safetensors safetensors.torch load_file save_file", ".bin torch load save"


def save_weights(path: Path, tensors: Mapping[str, Tensor], card: Card) -> None:
    """Write `tensors` (a `state_dict`) and `card` to `path`, replaced when all is written.

    Raises:
        MeshuffleError: the disk does not take it; an older file is as it was.
    """
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with disk_errors(path.parent, SafetensorError), replaced(path) as temporary:
        save_file(_without_aliases(plain), temporary, metadata={_KEY: card.to_json()})


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share storage with an earlier one; safetensors refuses them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def split_key(target: Path) -> tuple[Path, str | None]:
    """Return the file and the key of `FILE?key=NAME`: which of several weights in it is meant.

    >>> split_key(Path("checkpoint.pth?key=model_ema"))
    (PosixPath('checkpoint.pth'), 'model_ema')
    """
    path, options = split_options(str(target), ["key"])
    return Path(path), options.get("key")


def find_weights(target: Path) -> Path:
    """Return the weights file that `target` means.

    That is itself, the best one of a run folder, the one of a folder of transformers, or that of
    `torchvision:NAME`, downloaded once.

    Args:
        target: may end in `?key=NAME`, see `split_key`.

    Raises:
        RunError: nothing there, with what was looked for.
    """
    target = split_key(target)[0]
    part = re.search(r"-of-(?!0*1\.)\d+(\.safetensors|\.bin)$", target.name)
    if target.is_file() and not part:
        return target
    if not target.exists() and str(target).startswith(_HUB):
        return _downloaded(str(target).removeprefix(_HUB))
    if not target.exists():
        raise RunError(f"{target}: no such run folder or weights file")
    for name in ("weights/best.safetensors", "weights/last.safetensors", *FILES):
        if (path := target / name).is_file():
            return path
    for (end, *how), name in zip(map(str.split, _JOINED), FILES, strict=True):
        if part[1] == end if part else [*target.glob(f"*-of-*{end}")]:
            folder = str(target.parent if part else target)
            raise RunError(f"{target}: {_JOIN.format(*how, folder, end, name)}")
    join = "join its parts with dcp_to_torch of torch.distributed.checkpoint.format_utils"
    hint = join if (target / ".metadata").is_file() else "is it a run folder?"
    raise RunError(f"{target}: no weights/best.safetensors or {' or '.join(FILES)} in it; {hint}")


def _downloaded(name: str) -> Path:
    """Return the file of torchvision's default weights, in torch's cache of downloads."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(f"torchvision:{name}: no such model{did_you_mean(name, known)}")
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = torch.hub.HASH_REGEX.search(path.name)
        try:
            torch.hub.download_url_to_file(
                url, str(path), digest[1] if digest else None, progress=sys.stderr.isatty()
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise RunError(
                f"torchvision:{name}: {url} cannot be downloaded ({error}); fetch it elsewhere and "
                f"give the file in its place, with --model torchvision:{name}"
            ) from None
    return path


def has_card(path: Path) -> bool:
    """Whether a file says itself what it is, so that nothing about it was chosen here."""
    if path.suffix != ".safetensors":
        return False
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return _KEY in (file.metadata() or {})
    return False


def read_weights(path: Path) -> tuple[dict[str, Tensor], Card | None]:
    """Return the tensors of a weights file, and its card where it has one.

    Takes safetensors, and `torch.save` files (see `foreign.py`).

    Raises:
        RunError: the file is broken, or holds something other than tensors.
    """
    return _read(path)[:2]


def _read(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], Card | None, list[str]]:
    """Return what `read_weights` does, and lines about the rest of the file; `key`: see there."""
    if path.suffix != ".safetensors":
        tensors, lines = read_torch(path, key)
        return tensors, None, lines
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path}: not a readable safetensors file: {kind_of(path)} ({error})"
        ) from None
    try:
        card = Card.from_json(text) if text else None
    except (ValueError, TypeError, LookupError, AttributeError, ConfigError) as error:
        raise RunError(f"{path}: its card cannot be read ({error})") from None
    return tensors if key is None else below(path, tensors, key), card, []


@dataclass(frozen=True)
class Opened:
    """Weights with what they are.

    Attributes:
        path: of the file.
        tensors: under the keys of their model.
        card: the file's, or made from what `recognise` reads in the keys.
        remarks: lines for the user about what else is in the file, and what was left out.
    """

    path: Path
    tensors: dict[str, Tensor]
    card: Card
    remarks: tuple[str, ...] = ()


def open_weights(target: Path, model: str | None = None) -> Opened:
    """Open weights, whoever wrote them; see `load_model`.

    Raises:
        RunError: the file is missing or broken, or has NaN or infinite values.
        ModelError: the model is not seen from the keys.
    """
    path = find_weights(target)
    tensors, card, remarks = _read(path, split_key(target)[1])
    _check_finite(path, tensors, is_ours=card is not None)
    if card is not None:
        return Opened(path, tensors, card)
    try:
        named = model is not None and not model.startswith("transformers:")
        found, prefix, own = None if named else saved_pretrained(path), "", tensors
        if found is None or model not in (None, found.model):
            own, prefix = unwrap(tensors, model)
            found = recognise(own, model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if prefix:
        remarks.append(f"{path}: took the prefix {prefix!r} off {len(own)} keys")
    start = prefix.partition(", ")[0]
    first = next((key for key in tensors if key.startswith(start)), "")
    if own and (ours := next(iter(own))) not in (first, first.removeprefix(start)):
        remarks.append(f"{path}: numbered keys are in the model's order: {first} is {ours}")
    if rest := [key for key in tensors if not key.startswith(tuple(prefix.split(", ")))]:
        same = f".{prefix and first.removeprefix(start)}"
        parts = [key.removesuffix(same) for key in rest if key.endswith(same)]
        parts = [part for part in parts if part.count(".") + 1 == start.count(".")]
        how = f" ({shlex.quote(f'{path}?key={parts[0]}')} takes them)" if parts else ""
        remarks.append(left_out(path, rest, f"are beside the model{how}"))
    card = Card(
        model=found.model,
        classes=found.classes or tuple(map(str, range(found.num_classes))),
        preprocess=found.preprocess,
        knobs=found.knobs,
        source=found.source,
        named=False,
    )
    return Opened(path, found.tensors, card, tuple(remarks))


def _check_finite(path: Path, tensors: Mapping[str, Tensor], *, is_ours: bool) -> None:
    """Refuse NaN and infinite values; a mask, of zeros and −inf, has them on purpose."""
    broken = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (good := tensor.isfinite()).all():
            rest, values = tensor[~good], tensor[good]
            if not (len(values) and (values == 0).all() and (rest == -torch.inf).all()):
                broken[name] = f"{len(rest):,} of {tensor.numel():,} values of {name}"
    if broken:
        more = f", and values of {len(broken) - 1} more tensors," if len(broken) > 1 else ""
        why = "the training diverged; train again with a lower --lr, or with --clip-norm 1"
        if not is_ours:
            why = "the file is damaged or its training diverged; use an earlier checkpoint of it"
        raise RunError(f"{path}: {next(iter(broken.values()))}{more} are NaN or infinite: {why}")


def remarks_on(target: Path, model: str | None = None) -> tuple[str, ...]:
    """Return the remarks of `open_weights`; files with a card have none, and are not read."""
    path = find_weights(target)
    return () if has_card(path) else open_weights(target, model).remarks


def load_model(
    target: Path, model: str | None = None, *, mapped: bool = False
) -> tuple[nn.Module, Card]:
    """Rebuild the model of a run folder or a weights file, in eval mode, with its card.

    Args:
        target: a run folder, a file of a run, or published weights (see `find_weights`).
        model: of plain weights, whose model is not seen from their keys; or repeats the name of a
            `package.module:function` model, to allow its import.
        mapped: let parameters stay in the file, where it is safetensors, and take no memory until
            they are read; for who keeps a part of them, and soon.

    Raises:
        RunError: the file is missing or broken, or has NaN or infinite values.
        ModelError: the tensors do not fit the model, or the name must be given.
    """
    opened = open_weights(target, model)
    path, card = opened.path, opened.card
    network = _to_load(card, model, opened.tensors.keys())
    missing, unexpected, reshaped = load_matching(network, opened.tensors, assign=mapped)
    differing = {"missing": missing, "unexpected": unexpected, "other shape": reshaped}
    if faults := [f"{what} {shortened(names, 3)}" for what, names in differing.items() if names]:
        how = "if the file is of another model, give that: --model package.module:function"
        if len(missing) <= 2 and not unexpected + reshaped:
            how = f"a backbone alone; train DATA --model {card.model} --from {path} adds it"
        raise ModelError(f"{path} does not fit {card.model}: {'; '.join([*faults, how])}")
    return network.eval(), card


def _to_load(card: Card, model: str | None, names: Collection[str]) -> nn.Module:
    """Build the card's model, its parameters not filled if `names` are all of them."""
    with contextlib.suppress(Exception), Unfilled():  # of foreign code that computes with them
        network = build_model(card, model)
        if all(name in names for name, _ in network.named_parameters(remove_duplicate=False)):
            return network
    return build_model(card, model)


def build_model(card: Card, model: str | None = None, *, seed: int = 0) -> nn.Module:
    """Build the card's model with random weights; see `load_model` for `model`."""
    require_repeated(card.model, model)
    return make_task(card, load=load_or_build).network(seed)


def load_or_build(target: Path, card: Card | None) -> tuple[nn.Module, Card]:
    """Return the model of `target` with its card, or that of `card`, untrained, if it is gone."""
    if card is not None and not split_key(target)[0].exists():
        return build_model(card), card
    return load_model(target)


def require_repeated(stored: str, model: str | None) -> None:
    """Refuse to import the code of a model that a file names, unless `model` repeats the name."""
    if is_foreign(stored) and not stored.startswith(f"{PREFIX}:") and model != stored:
        raise ModelError(
            f"the model is {stored}, which is code outside Meshuffle; "
            f"to run it, repeat its name: --model {stored}"
        )


def load_matching(
    model: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False
) -> tuple[list[str], list[str], list[str]]:
    """Copy the tensors that fit into `model`; return the names (missing, unexpected, reshaped).

    Args:
        assign: make them its own instead, without a copy where they have its dtype.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    shared = [name for name in tensors if name in own]
    reshaped = [name for name in shared if tensors[name].shape != own[name].shape]
    fitting = {n: tensors[n].to(own[n].dtype) for n in shared if n not in reshaped}
    load_tensors(model, fitting, strict=False, assign=assign)
    return missing, unexpected, reshaped


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True, assign: bool = False
) -> None:
    """Load a module's tensors as if it had saved them itself.

    A file of tensors has no versions of layers, and some modules load nothing without them:
    torchvision's MNASNet.
    """
    versioned: OrderedDict[str, Any] = OrderedDict(tensors)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, strict=strict, assign=assign)
