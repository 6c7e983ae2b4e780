"""Checkpoints of other programs, as their authors save them."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import pathlib
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import torchvision.models
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from meshuffle.cli import main
from meshuffle.config import TrainConfig
from meshuffle.data.source import absolute_data
from meshuffle.errors import DataError, ModelError, RunError
from meshuffle.models import create_model
from meshuffle.models.foreign import read_torch
from meshuffle.train.initial_weights import open_initial_weights
from meshuffle.train.state import new_model
from meshuffle.weights import load_model, open_weights

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return create_model(NAME, num_classes=3, seed=0).state_dict()


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def same(path: Path, tensors: dict[str, Tensor], key: str = "") -> tuple[str, ...]:
    """Load a file, compare, and return what there is to say about it, without the path."""
    opened = open_weights(Path(f"{path}{key}"))
    assert opened.card.model == NAME and opened.tensors.keys() == tensors.keys()
    assert all(torch.equal(opened.tensors[k], v) for k, v in tensors.items())
    load_model(Path(f"{path}{key}"))
    assert all(line.startswith(f"{path}: ") for line in opened.remarks)
    return tuple(line.removeprefix(f"{path}: ") for line in opened.remarks)


class _AttributeDict(dict[str, Any]):
    """Lightning's, which need not be installed where its checkpoints are read."""


_AttributeDict.__name__ = _AttributeDict.__qualname__ = "AttributeDict"
_AttributeDict.__module__ = "lightning.fabric.utilities.data"


def beside(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what training scripts store beside the weights."""
    parts = _AttributeDict.__module__.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__dict__.update(__path__=[], AttributeDict=_AttributeDict)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    return {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/runs"), when=datetime.datetime.now()),
        "windows": pathlib.PureWindowsPath("C:/runs"),
        "hyper_parameters": _AttributeDict(lr=0.1, sizes=collections.defaultdict(list, a=[1])),
        "best_acc": np.float64(91.2),
        "curve": np.arange(3.0),
        "dtype": np.dtype("int32"),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3]).state_dict(),
        "metrics": collections.OrderedDict(top1=np.float32(3)),
        "epoch": 3,
    }


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "network"])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_inert_values(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    zipped: bool,
) -> None:
    path, content = tmp_path / "saved.ckpt", {**beside(monkeypatch), key: tensors}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, _AttributeDict.__module__)
    assert same(path, tensors) == ()


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.backbone.", "module._orig_mod.", "model._orig_mod."],
)
def test_prefixes_of_wrappers_are_taken_off_and_said(
    tmp_path: Path, tensors: dict[str, Tensor], prefix: str
) -> None:
    says = f"took the prefix '{prefix}' off {len(tensors)} keys"
    torch.save({"state_dict": under(prefix, tensors)}, tmp_path / "a.ckpt")
    assert same(tmp_path / "a.ckpt", tensors) == (says,)
    save_file(under(prefix, tensors), tmp_path / "a.safetensors")
    assert same(tmp_path / "a.safetensors", tensors) == (says,)


def test_a_few_tensors_beside_the_model_do_not_keep_its_prefix(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    """As Lightning saves a module with class weights and a metric beside its `model`."""
    path, beside = tmp_path / "a.pth", {"cw": torch.ones(3), "loss.weight": torch.ones(2)}
    torch.save({"state_dict": {**beside, **under("model.", tensors)}}, path)
    says = f"took the prefix 'model.' off {len(tensors)} keys"
    assert same(path, tensors) == (says, "left out 2 that are beside the model: cw, loss.weight")
    own = {**beside, **under("model.", create_model("torchvision:resnet18").state_dict())}
    torch.save(own, path)
    load_model(path, "torchvision:resnet18")


def test_a_prefix_of_half_the_keys_stays(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(under("student.", tensors) | under("teacher.", tensors), tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"do not show which model .*keys: student\.conv1"):
        load_model(tmp_path / "a.pth")


def test_of_several_parts_the_one_that_is_the_model_named(tmp_path: Path) -> None:
    """As MoCo saves an encoder and its average, MMPretrain a head beside, lightly none."""
    name, path = "torchvision:resnet18", tmp_path / "a.pth"
    own = create_model(name, num_classes=3).state_dict()
    moco = {**under("encoder_q.", own), **under("encoder_k.", own), "queue": torch.ones(2, 2)}
    moco = {key: tensor.clone() for key, tensor in moco.items()}
    moco["encoder_k.fc.bias"] += 1
    head = {key: tensor for key, tensor in own.items() if key.startswith("fc.")}
    body = under("backbone.", {key: own[key] for key in own.keys() - head.keys()})
    for tensors in ({**body, **under("head.", head)}, under("module.", moco)):
        torch.save({"state_dict": tensors}, path)
        found = load_model(path, name)[0].state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in own.items())
    line = next(line for line in open_weights(path, name).remarks if "takes them" in line)
    assert f"('{path}?key=module.encoder_k' takes them)" in line
    other = load_model(Path(f"{path}?key=module.encoder_k"), name)[0]
    assert torch.equal(other.state_dict()["fc.bias"], own["fc.bias"] + 1)
    torch.save({**body, "projection_head.0.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ModelError, match=r"missing fc\.weight, fc\.bias; a backbone .* --from"):
        load_model(path, name)


def test_numbered_keys_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    """As lightly's tutorials save `nn.Sequential(*list(resnet.children())[:-1])`."""
    name, path = "torchvision:resnet18", tmp_path / "a.pth"
    own = create_model(name, num_classes=1000, seed=3)
    body = nn.Sequential(*list(own.children())[:-1]).state_dict()
    torch.save({"state_dict": {**under("backbone.", body), **under("momentum.", body)}}, path)
    opened = open_weights(path, name)
    assert all(
        torch.equal(opened.tensors[k], v) for k, v in own.state_dict().items() if "fc" not in k
    )
    assert any("numbered keys" in line and "conv1.weight" in line for line in opened.remarks)
    with pytest.raises(ModelError, match=r"missing fc\.weight, fc\.bias; a backbone .* --from"):
        load_model(path, name)
    torch.save(dict(reversed(body.items())), path)
    with pytest.raises(ModelError, match="does not fit"):
        load_model(path, name)


def test_a_line_says_what_to_do_with_what_is_no_state_of_the_model(tmp_path: Path) -> None:
    net, path = create_model("torchvision:resnet18"), tmp_path / "a.pth"
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(2, 3, 32, 32)).sum().backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), path)
    with pytest.raises(RunError, match="an optimizer's state; give the file of"):
        load_model(path, "torchvision:resnet18")
    prune.l1_unstructured(net.conv1, "weight", 0.3)
    torch.save(net.state_dict(), path)
    with pytest.raises(ModelError, match=r"conv1.weight_mask; if .* --model package"):
        load_model(path, "torchvision:resnet18")


@pytest.mark.parametrize("content", [[1], {"conv1.weight": np.zeros(3)}])
def test_a_file_without_tensors_says_what_is_wanted(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(RunError, match=r"(found list|no tensors in it).*; wanted: safetensors, or"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "save"),
    [("model-{}-of-00002.safetensors", save_file), ("pytorch_model-{}-of-00002.bin", torch.save)],
)
def test_weights_in_parts_are_joined_as_the_message_says(
    tmp_path: Path, name: str, save: Callable[..., None]
) -> None:
    own = create_model("torchvision:resnet18").state_dict()
    parts = [dict(list(own.items())[:50]), dict(list(own.items())[50:])]
    paths = [tmp_path / name.format(i) for i in ("00001", "00002")]
    for path, part in zip(paths, parts, strict=True):
        save(part, path)
    for path in (paths[0], tmp_path):
        with pytest.raises(RunError, match="in parts; join them in Python: ") as caught:
            load_model(path, "torchvision:resnet18")
    exec(str(caught.value).partition("in Python: ")[2], {})
    assert load_model(tmp_path, "torchvision:resnet18")[0].state_dict().keys() == own.keys()


def test_the_prefix_of_a_model_that_is_named(tmp_path: Path) -> None:
    """Its keys are compared, as no maker has them; a prefix that is the model's own stays."""
    path, name = tmp_path / "a.pth", f"{__name__}:Wrapped"
    own = Wrapped(2).state_dict()
    torch.save(under("module.", own), path)
    assert open_weights(path, name).tensors.keys() == own.keys()
    torch.save(own, path)
    assert not open_weights(path, name).remarks
    load_model(path, name)


class Wrapped(nn.Module):
    """All its keys begin with `model.`."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.model = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.mean((2, 3)))


def test_averaged_weights_are_read_on_request(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """As torchvision's script saves them, and timm's."""
    path = tmp_path / "a.pth"
    model = create_model(NAME, num_classes=3, seed=1)
    average = AveragedModel(model).state_dict()
    torch.save({"model": tensors, "model_ema": average, "args": argparse.Namespace()}, path)
    assert same(path, tensors) == (
        f"took the weights of 'model'; for others: '{path}?key=model_ema'",
    )
    assert same(path, model.state_dict(), "?key=model_ema") == (
        f"took the weights of 'model_ema'; for others: '{path}?key=model'",
        f"took the prefix 'module.' off {len(tensors)} keys",
        "left out 1 that are beside the model: n_averaged",
    )
    torch.save({"state_dict": tensors, "state_dict_ema": model.state_dict()}, path)
    same(path, model.state_dict(), "?key=state_dict_ema")
    torch.save({"teacher": model.state_dict(), "epoch": torch.tensor(3)}, path)
    assert same(path, model.state_dict()) == ()
    torch.save(average, path)
    same(path, model.state_dict())
    with pytest.raises(RunError, match="no weights under 'teacher'; it has no parts"):
        open_weights(Path(f"{path}?key=teacher"))
    with pytest.raises(DataError, match=r"'ema=1' is no option; known: \?key=…"):
        open_weights(Path(f"{path}?ema=1"))
    torch.save({"teacher": tensors, "student": tensors}, path)
    with pytest.raises(RunError, match=r"say which: .*key=teacher' or .*key=student'"):
        open_weights(path)
    with pytest.raises(RunError, match="did you mean 'student'"):
        open_weights(Path(f"{path}?key=students"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_into_float32(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    torch.save({"model": half}, tmp_path / "a.pth")
    network, _ = load_model(tmp_path / "a.pth")
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in network.state_dict().items())
    assert {p.dtype for p in network.parameters()} == {torch.float32}


class Settings:
    """A class that no other program has."""


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_code_is_refused_by_name_with_the_way_out(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the lines of Python that are printed do it."""
    monkeypatch.chdir(tmp_path)
    model, path = create_model(NAME, num_classes=3, seed=0).eval(), Path("a b.pth")
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    theirs.load_state_dict(tensors)
    script = torch.jit.script(theirs)
    contents = [
        ({"args": Settings(), "model": tensors}, f"{__name__}.Settings, which is code"),
        (model, r"whole pickled module \(meshuffle.models.shufflenet_v2.ShuffleNetV2\)"),
        ({"model": model, "epoch": 1}, "whole pickled module"),
        (script, "a TorchScript archive"),
    ]
    for content, says in contents:
        script.save(path) if content is script else torch.save(content, path)
        with pytest.raises(RunError, match=says) as error:
            load_model(path)
        lines = str(error.value).rpartition("in Python: ")[2]
        assert "\n" not in str(error.value) and "print" not in lines
        exec(lines, {"torch": torch})
        same(Path("a b-weights.pth"), tensors)


_ZIP = b"PK\x05\x06" + bytes(18)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 not a zip", "zip archive that is cut off"),
        (_ZIP, "zip archive"),
        (b"PK\x03\x04" + b"x" * 30 + _ZIP, "zip archive"),
        (
            b"PK\x01\x02" + b"x" * 46 + b"PK\x05\x06" + bytes(4) + b"\x01\0\x01\0002" + bytes(9),
            "zip",
        ),
        (b"\x80\x02}q\x00.", "pickle"),
        (pickle.dumps({"a": (1, 2)}), "pickle"),
        (b"\x80\x04\x95", "pickle"),
        (b"x" * 99, "text file"),
        (b"epoch,loss\n1,0.5\n", "text file"),
        (b"\n<!DOCTYPE html><html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (bytes(range(7)), "damaged, or another program"),
    ],
)
def test_what_is_no_weights_file(tmp_path: Path, content: bytes, says: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"a\.{suffix}: not a readable .*({says})") as error:
        open_weights(path)
    assert "\n" not in str(error.value)


def test_code_that_torchs_list_of_names_cannot_read(tmp_path: Path) -> None:
    """An opcode that it does not know, behind the name of a class: an exported fastai Learner."""
    path = tmp_path / "export.pkl"
    for name, says in (("fastai.learner\nLearner", "load_learner"), ("a.b\nC", "holds a.b.C,")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("export/data.pkl", f"\x80\x02c{name}\nq\x000.".encode("latin-1"))
            archive.writestr("export/version", "3")
            archive.writestr("export/byteorder", "little")
        with pytest.raises(RunError, match=says):
            read_torch(path)


def test_keys_of_a_model_that_we_do_not_have(tmp_path: Path) -> None:
    torch.save({"model.0.conv.weight": torch.ones(1)}, tmp_path / "yolo.pth")
    with pytest.raises(ModelError, match="YOLO's, and Meshuffle has no such model; give your own"):
        open_weights(tmp_path / "yolo.pth")


def test_train_lists_what_was_done(
    tmp_path: Path, tensors: dict[str, Tensor], small: TrainConfig
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": under("model.", tensors), "ema": tensors}, path)
    config = dataclasses.replace(small, knobs={}, from_=f"{path}?key=state_dict")
    start = open_initial_weights(config, None)
    assert start is not None
    lines = start.copy_into(new_model(config, start.card), start.card)
    assert any("took the prefix 'model.' off" in line for line in lines)
    assert any("for others: " in line for line in lines)


def test_predict_says_it_on_standard_error(
    tmp_path: Path, tensors: dict[str, Tensor], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"ema": tensors, "model": under("module.", tensors)}, path)
    image = next((photos / "val").rglob("*.png"))
    assert main(["predict", f"{path}?key=model", str(image), "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "took the prefix 'module.' off" in err


def test_the_key_stays_behind_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert absolute_data("a.pth?key=ema") == f"{tmp_path / 'a.pth'}?key=ema"


def test_weights_two_levels_down(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """As Composer saves: `state.model`, and fastai's lists and torch's version beside them."""
    path, version = tmp_path / "composer.pt", torch.torch_version.TorchVersion("2.7")
    torch.save({"state": {"model": tensors, "timestamp": {}, "torch": version}, "rng": []}, path)
    found, lines = read_torch(path)
    assert found.keys() == tensors.keys() and not lines
    torch.save({"state": {"model": tensors, "ema": tensors}}, path)
    assert "?key=state.ema" in read_torch(path)[1][0]
    assert read_torch(path, "state.ema")[0].keys() == tensors.keys()


def test_weights_quantized_to_integers(tmp_path: Path) -> None:
    """PyTorch's own, static (torch.qint8) and dynamic (packed)."""
    with warnings.catch_warnings(action="ignore"):
        whole = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    for state in (
        {"fc.weight": whole},
        {"fc._packed_params.dtype": torch.qint8, "a.weight": torch.ones(1)},
    ):
        torch.save(state, tmp_path / "int8.pth")
        with pytest.raises(RunError, match=r"int8\.pth: quantized to integers; give the weights"):
            read_torch(tmp_path / "int8.pth")


def test_a_distributed_checkpoint_in_parts(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.distributed.checkpoint.save({"model": tensors}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(RunError, match="join its parts with dcp_to_torch"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["R-50.pkl", "model.pdparams", "model.weights.h5"])
def test_files_of_other_libraries(tmp_path: Path, name: str) -> None:
    """Detectron2's, PaddlePaddle's and Keras's."""
    content = b"\x89HDF\r\n" + bytes(99)
    if name != "model.weights.h5":
        content = pickle.dumps({"w": np.ones(3)}, protocol=2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match="wanted: safetensors, or a state_dict that"):
        open_weights(tmp_path / name)
