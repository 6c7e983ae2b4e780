"""Weights files: the card, what is refused, and what is taken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshuffle.data import Preprocess
from meshuffle.deploy.api import export
from meshuffle.errors import ModelError, RunError
from meshuffle.infer.predict import evaluate
from meshuffle.models import create_model
from meshuffle.models.published import unwrap
from meshuffle.models.unfilled import Unfilled
from meshuffle.tasks.card import Card
from meshuffle.train.api import resume
from meshuffle.weights import (
    find_weights,
    load_matching,
    load_model,
    open_weights,
    read_weights,
    save_weights,
)

CARD = Card(
    model="shufflenet_v2_x0_5",
    classes=("Äpfel", "pears"),
    preprocess=Preprocess(crop=(32, 48), resize=None, channels="BGR"),
    knobs={"depths": [1, 1, 1], "head_channels": 16},
    titles={"pears": "a pear"},
    data="/data/fruit",
    epoch=3,
    metrics={"top1": 50.0, "loss": 0.7},
)


def model(num_classes: int = 2) -> nn.Module:
    return create_model(CARD.model, num_classes=num_classes, seed=1, **CARD.knobs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "run" / "weights" / "best.safetensors"
    save_weights(found, model().state_dict(), CARD)
    return found


def test_card_and_model_come_back(path: Path) -> None:
    network, card = load_model(path)
    assert card == CARD
    assert not network.training
    for name, tensor in model().state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    assert find_weights(path.parents[1]) == path


def test_a_later_versions_card() -> None:
    text = json.dumps({**json.loads(CARD.to_json()), "invented_later": 1})
    assert Card.from_json(text) == CARD


def test_last_where_there_is_no_best(path: Path) -> None:
    last = path.rename(path.with_name("last.safetensors"))
    assert find_weights(path.parents[1]) == last
    last.unlink()
    with pytest.raises(RunError, match="is it a run folder"):
        find_weights(path.parents[1])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder or weights file"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x10\0\0\0\0\0\0\0{}", b"x" * 1000])
def test_broken_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match="not a readable safetensors file"):
        load_model(path)


def test_truncated_safetensors(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="not a readable safetensors file"):
        load_model(path)


@pytest.mark.parametrize("card", ["{", "[]", "{}", '{"model": "x"}', '{"preprocess": 3}'])
def test_a_broken_card(path: Path, card: str) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path, metadata={"meshuffle": card})
    with pytest.raises(RunError, match="card cannot be read"):
        load_model(path)


def test_plain_torch_files(tmp_path: Path) -> None:
    tensors = model().state_dict()
    for number, content in enumerate(
        (tensors, {"state_dict": tensors}, {f"module.{k}": v for k, v in tensors.items()})
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        found, card = read_weights(path)
        assert card is None
        assert unwrap(found)[0].keys() == tensors.keys()
    with pytest.raises(ModelError, match=r"2\.pth: the keys are those of torchvision's .* none of"):
        load_model(path)  # of other depths than any published model
    tensors = create_model("shufflenet_v2_x0_5", num_classes=2).state_dict()
    torch.save(tensors, path)
    network, found_card = load_model(path)
    assert found_card.source == "torchvision's ShuffleNet V2" and not found_card.named
    assert all(torch.equal(network.state_dict()[k], v) for k, v in tensors.items())


def test_downloads_once_and_says_where_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import ShuffleNet_V2_X0_5_Weights as Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    tensors = create_model("shufflenet_v2_x0_5").state_dict()
    torch.save(tensors, tmp_path / "made.pth")
    digest = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:10]
    source = tmp_path / f"shufflenetv2_x0.5-{digest}.pth"
    weights = dataclasses.replace(Weights.DEFAULT.value, url=source.as_uri())
    monkeypatch.setattr(Weights.DEFAULT, "_value_", weights)
    with pytest.raises(RunError, match=r"cannot be downloaded .* --model torchvision:shuff"):
        load_model(Path("torchvision:shufflenet_v2_x0_5"))
    source.write_bytes(b"other bytes than were published")
    with pytest.raises(RunError, match=r"cannot be downloaded \(invalid hash value"):
        load_model(Path("torchvision:shufflenet_v2_x0_5"))
    (tmp_path / "made.pth").replace(source)
    for _ in range(2):
        network, card = load_model(Path("torchvision:shufflenet_v2_x0_5"))
        assert torch.equal(network.fc.weight, tensors["fc.weight"])
        assert card.classes[0] == "tench" and card.preprocess.resize == 256
        source.unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no such model; did you mean 'shuff"):
        load_model(Path("torchvision:shufflenet_v2_x0"))


class Sly:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("executed",)


def test_a_torch_file_with_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sly.pth"
    torch.save({"weight": Sly()}, path)
    with pytest.raises(RunError, match=r"holds builtins\.print, which is code"):
        read_weights(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}])
def test_a_torch_file_without_tensors(tmp_path: Path, content: object) -> None:
    path = tmp_path / "none.pth"
    torch.save(content, path)
    with pytest.raises(RunError):
        read_weights(path)


def test_aliases_are_stored_twice(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    empty = {"c": torch.empty(0), "d": torch.empty(0)}
    path = tmp_path / "tied.safetensors"
    save_weights(path, {**tied.state_dict(), **empty}, CARD)
    found, _ = read_weights(path)
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert found["d"].shape == (0,)


def test_a_view_of_a_larger_tensor(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_weights(tmp_path / "w.safetensors", {"first": whole[:3], "all": whole}, CARD)
    found, _ = read_weights(tmp_path / "w.safetensors")
    assert found["first"].tolist() == [0, 1, 2]
    assert found["all"].tolist() == [0, 1, 2, 3, 4, 5]


def test_other_shapes_are_listed(path: Path) -> None:
    tensors, _ = read_weights(path)
    missing, unexpected, reshaped = load_matching(model(5), {**tensors, "extra": torch.ones(1)})
    assert (missing, unexpected) == ([], ["extra"])
    assert set(reshaped) == {"fc.weight", "fc.bias"}
    save_weights(path, model(5).state_dict(), CARD)
    with pytest.raises(ModelError, match=r"other shape fc\."):
        load_model(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused(path: Path, tmp_path: Path, value: float) -> None:
    tensors = model().state_dict()
    tensors["conv5.0.weight"][0, :2] = value
    save_weights(path, tensors, CARD)
    says = r"best\.safetensors: 2 of 3,072 values of conv5\.0\.weight are NaN or infinite: the "
    for opens in (load_model, open_weights, evaluate, export):
        with pytest.raises(RunError, match=says):
            opens(path.parents[1])
    tensors["fc.bias"].fill_(value)
    torch.save({"model": tensors}, tmp_path / "theirs.pth")
    with pytest.raises(RunError, match=r"weight, and values of 1 more tensors, are .* damaged or"):
        load_model(tmp_path / "theirs.pth", CARD.model)


def test_a_mask_of_minus_infinity_is_no_fault(path: Path) -> None:
    mask = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    save_weights(path, {"mask": mask, "half": torch.ones(2, dtype=torch.float16)}, CARD)
    open_weights(path)
    save_weights(path, {"mask": mask + 1}, CARD)
    with pytest.raises(RunError, match="3 of 9 values of mask"):
        open_weights(path)


CODE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()
def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    return tmp_path / "imported"


def test_code_is_imported_only_when_its_name_is_repeated(tmp_path: Path, factory: Path) -> None:
    tensors = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).state_dict()
    card = Card("own_code:tiny", ("a", "b"), Preprocess(crop=8, resize=8))
    path = tmp_path / "run" / "weights" / "best.safetensors"
    save_weights(path, tensors, card)
    for target in (path, path.parents[1]):
        with pytest.raises(ModelError, match="repeat its name: --model own_code:tiny"):
            load_model(target)
    with pytest.raises(ModelError, match="repeat its name"):
        load_model(path, model="own_code:other")
    with pytest.raises(ModelError, match="repeat its name"):
        evaluate(path)
    (tmp_path / "run" / "config.toml").write_text('data = "digits"\nmodel = "own_code:tiny"\n')
    with pytest.raises(ModelError, match="repeat its name"):
        resume(tmp_path / "run")
    assert not factory.exists()
    load_model(path, model="own_code:tiny")
    assert factory.exists()


def in_file(tensor: Tensor, path: Path) -> bool:
    """Tell whether a tensor's memory is a mapping of the file."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= place < int(last, 16):
            return line.endswith(str(path))
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_mapped_parameters_stay_in_the_file(path: Path) -> None:
    (copied, _), (mapped, _) = load_model(path), load_model(path, mapped=True)
    for own, other in zip(copied.parameters(), mapped.parameters(), strict=True):
        assert torch.equal(own, other)
        assert in_file(other, path) and not in_file(own, path)


def test_what_is_loaded_is_not_filled_before() -> None:
    fills = (nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.trunc_normal_, nn.init.ones_)
    with Unfilled():
        weight = nn.Conv2d(3, 3, 1).weight
        with torch.no_grad():
            weight.view(torch.int32)[:] = 1  # no parameter is filled, but a view of it is
        for fill in fills:
            assert fill(weight) is weight
            assert (weight.view(torch.int32) == 1).all()
        assert nn.init.ones_(torch.empty(2)).tolist() == [1, 1]


class Odd(nn.Module):
    """Has a parameter that no state dict has, and computes with others while it is built."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(3, num_classes)
        self.body.weight.sum().item()
        self.hidden = nn.Parameter(torch.full((2,), 7.0))
        nn.init.constant_(self.hidden, 5.0)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        found.pop("hidden", None)
        return found


def test_a_parameter_that_is_in_no_file_has_its_own_values(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, model=f"{__name__}:Odd", knobs={})
    save_weights(tmp_path / "w.safetensors", Odd().state_dict(), card)
    network, _ = load_model(tmp_path / "w.safetensors", card.model)
    assert network.get_parameter("hidden").tolist() == [5, 5]
