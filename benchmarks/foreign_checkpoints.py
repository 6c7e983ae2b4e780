"""Checkpoints as other programs save them: does Meshuffle read them, and compute the same?

    python benchmarks/foreign_checkpoints.py write FOLDER    # where the frameworks are installed
    python benchmarks/foreign_checkpoints.py read FOLDER     # where Meshuffle is

`write` trains a torchvision ResNet-18 (or the framework's own model) for one step with each
framework that can be imported, lets it save as its users do, and keeps what the network says of
one image. `read` opens each file and compares; a file that holds pickled code must be refused, by
naming what it is. Prints a line for each; results/foreign_checkpoints.csv gets the rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CLASSES, SIDE = 5, 64
Written = tuple[nn.Module, str, str]
"""The network, the file within the folder, and the name that Meshuffle needs for its model."""

RESNET = "torchvision:resnet18"


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=CLASSES)


def batches() -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(torch.rand(4, 3, SIDE, SIDE), torch.arange(4) % CLASSES)
    return torch.utils.data.DataLoader(data, 4)


def step(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = next(iter(batches()))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def torchvision_reference(folder: Path) -> Written:
    """As references/classification/train.py saves."""
    model = resnet()
    optimizer, average = step(model), torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"lr_scheduler": scheduler.state_dict(), "epoch": 0}
    state |= {
        "args": argparse.Namespace(lr=0.1, model="resnet18"),
        "model_ema": average.state_dict(),
    }
    torch.save(state, folder / "model_0.pth")
    return model, "model_0.pth", RESNET


def lightning(folder: Path) -> Written:
    import lightning.pytorch as pl

    class Net(pl.LightningModule):
        def __init__(self, rate: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net, self.rate = resnet(), rate

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), self.rate)

    net = Net()
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_checkpointing=False, default_root_dir=str(folder))  # fmt: skip
    trainer.fit(net, batches())
    trainer.save_checkpoint(folder / "last.ckpt")
    return net.net, "last.ckpt", RESNET


def _learner(folder: Path) -> Any:
    from fastai.callback.progress import no_bar  # noqa: F401  # it adds the method
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    loader = DataLoader(list(batches().dataset), bs=4)
    learner = Learner(DataLoaders(loader, loader), resnet(), F.cross_entropy, path=folder)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    return learner


def fastai(folder: Path) -> Written:
    learner = _learner(folder)
    learner.save("saved")
    return learner.model, "models/saved.pth", RESNET


def ignite(folder: Path) -> Written:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver

    model = resnet()
    optimizer = step(model)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)
    saver = Checkpoint({"model": model, "optimizer": optimizer, "trainer": trainer},
                       DiskSaver(str(folder), require_empty=False))  # fmt: skip
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(batches(), max_epochs=1)
    return model, Path(saver.last_checkpoint).name, RESNET


def accelerate(folder: Path) -> Written:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), resnet()
    model, _ = accelerator.prepare(model, step(model))
    accelerator.save_state(str(folder / "state"))
    return model, "state/model.safetensors", RESNET


def composer(folder: Path) -> Written:
    from composer import Trainer
    from composer.models import ComposerClassifier

    model = ComposerClassifier(resnet(), num_classes=CLASSES)
    loader = batches()
    trainer = Trainer(model=model, train_dataloader=loader, max_duration="1ep", device="cpu",
                      optimizers=torch.optim.SGD(model.parameters(), 0.01), progress_bar=False,
                      )  # fmt: skip
    trainer.fit()
    trainer.save_checkpoint(str(folder / "composer.pt"))
    return model.module, "composer.pt", RESNET


def timm_saver(folder: Path) -> Written:
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("mobilenetv3_small_050", num_classes=CLASSES)
    optimizer = step(model)
    saver = CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model="mobilenetv3_small_050", lr=0.1),
        model_ema=ModelEmaV3(model), checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(0, 50.0)
    return model, "last.pth.tar", "timm:mobilenetv3_small_050"


def transformers(folder: Path) -> Written:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=16)
    config.num_labels = CLASSES
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder / "hub")
    return model, "hub/model.safetensors", "transformers:resnet"


def swa(folder: Path) -> Written:
    model = resnet()
    average = torch.optim.swa_utils.AveragedModel(model)
    step(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), folder / "swa.pt")
    return average.module, "swa.pt", RESNET


def compiled(folder: Path) -> Written:
    model = resnet()
    step(model)
    torch.save({"epoch": 3, "state_dict": torch.compile(model).state_dict()}, folder / "c.pt")
    return model, "c.pt", RESNET


def half(folder: Path) -> Written:
    from safetensors.torch import save_file

    model = resnet()
    step(model)
    model = model.half().float()
    save_file({k: v.half() for k, v in model.state_dict().items()}, folder / "half.safetensors")
    return model, "half.safetensors", RESNET


def distributed_checkpoint(folder: Path) -> Written:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = resnet()
    step(model)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    dcp_to_torch_save(folder / "dcp", folder / "joined.pt")
    return model, "joined.pt", RESNET


def ultralytics(folder: Path) -> Written:
    """The network's object, pickled: code."""
    from ultralytics import YOLO

    yolo = YOLO("yolov8n-cls.yaml", verbose=False)
    yolo.ckpt = {"model": yolo.model}
    yolo.save(str(folder / "best.pt"))
    return yolo.model, "best.pt", "refused"


def whole_module(folder: Path) -> Written:
    """torch.save(model): code."""
    model = resnet()
    torch.save(model, folder / "model.pth")
    return model, "model.pth", "refused"


def torchscript(folder: Path) -> Written:
    model = resnet().eval()
    torch.jit.trace(model, next(iter(batches()))[0]).save(str(folder / "traced.pt"))
    return model, "traced.pt", "refused"


def fabric(folder: Path) -> Written:
    from lightning.fabric import Fabric

    tool, model = Fabric(accelerator="cpu"), resnet()
    model, optimizer = tool.setup(model, step(model))
    tool.save(folder / "fabric.ckpt", {"network": model, "optimizer": optimizer, "step": 1})
    return model.module, "fabric.ckpt", RESNET


def skorch(folder: Path) -> Written:
    import skorch

    net = skorch.NeuralNetClassifier(resnet, criterion=nn.CrossEntropyLoss, max_epochs=1,
                                     train_split=None, verbose=0)  # fmt: skip
    x, y = next(iter(batches()))
    net.fit(x.numpy(), y.numpy())
    net.save_params(f_params=folder / "params.pt", f_optimizer=folder / "optimizer.pt")
    return net.module_, "params.pt", RESNET


def mmengine(folder: Path) -> Written:
    """With its log, whose buffers are pickled objects: code."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Net(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = resnet()

        def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str) -> dict[str, Any]:
            return {"loss": F.cross_entropy(self.backbone(x), y)}

    runner = Runner(
        Net(), str(folder / "work"), batches(), train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}}, log_level="ERROR",
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
    )  # fmt: skip
    runner.train()
    return runner.model.backbone, "work/epoch_1.pth", "refused"


def pytorch_accelerated(folder: Path) -> Written:
    from pytorch_accelerated import Trainer

    model = resnet()
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.01),
                      callbacks=())  # fmt: skip
    trainer.train(batches().dataset, num_epochs=1, per_device_batch_size=4)
    trainer.save_checkpoint(str(folder / "trained.pt"))
    return model, "trained.pt", RESNET


def catalyst(folder: Path) -> Written:
    from catalyst import dl

    model, runner = resnet(), dl.SupervisedRunner()
    runner.train(model=model, criterion=nn.CrossEntropyLoss(), num_epochs=1,
                 optimizer=torch.optim.SGD(model.parameters(), 0.01), loaders={"train": batches()},
                 callbacks=[dl.CheckpointCallback(str(folder), mode="runner")])  # fmt: skip
    return model, "runner.last.pth", RESNET


def transformers_trainer(folder: Path) -> Written:
    """A vision transformer after Trainer.train, in its checkpoint-1."""
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, image_size=SIDE, patch_size=16)  # fmt: skip
    config.num_labels = CLASSES
    config.id2label = {i: f"kind {i}" for i in range(CLASSES)}
    data = [{"pixel_values": x, "labels": y} for x, y in batches().dataset]
    arguments = TrainingArguments(
        str(folder), max_steps=1, save_steps=1, report_to=[], use_cpu=True
    )
    trainer = Trainer(ViTForImageClassification(config), arguments, train_dataset=data)
    trainer.train()
    return trainer.model, "checkpoint-1", "transformers:vit"


def onnx(folder: Path) -> Written:
    """No checkpoint of PyTorch."""
    import onnx as package

    assert package.__version__
    model = resnet().eval()
    torch.onnx.export(model, (next(iter(batches()))[0],), str(folder / "net.onnx"), dynamo=False)
    return model, "net.onnx", "refused"


FRAMEWORKS: dict[str, tuple[Callable[[Path], Written], str]] = {
    "torchvision, reference script": (torchvision_reference, "torchvision"),
    "Lightning": (lightning, "lightning"),
    "fastai, save": (fastai, "fastai"),
    "Ignite": (ignite, "ignite"),
    "Accelerate, save_state": (accelerate, "accelerate"),
    "Composer": (composer, "composer"),
    "timm, CheckpointSaver": (timm_saver, "timm"),
    "transformers, save_pretrained": (transformers, "transformers"),
    "torch, AveragedModel": (swa, "torch"),
    "torch, compiled": (compiled, "torch"),
    "safetensors, float16": (half, "safetensors"),
    "torch, distributed checkpoint joined": (distributed_checkpoint, "torch"),
    "Ultralytics": (ultralytics, "ultralytics"),
    "torch, whole module": (whole_module, "torch"),
    "torch, TorchScript": (torchscript, "torch"),
    "Lightning Fabric": (fabric, "lightning"),
    "skorch": (skorch, "skorch"),
    "MMEngine": (mmengine, "mmengine"),
    "pytorch-accelerated": (pytorch_accelerated, "pytorch_accelerated"),
    "Catalyst": (catalyst, "catalyst"),
    "transformers, Trainer": (transformers_trainer, "transformers"),
    "ONNX": (onnx, "onnx"),
}


def write(home: Path) -> None:
    for place, (name, (save, module)) in enumerate(FRAMEWORKS.items()):
        folder = home / "".join(c if c.isalnum() else "-" for c in name)
        if (folder / "told.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(place)
        try:
            version = getattr(importlib.import_module(module), "__version__", "")
            model, file, wanted = save(folder)
        except Exception as error:  # noqa: BLE001  # a framework that does not run here
            print(f"{name}: not written ({type(error).__name__}: {str(error)[:150]})")
            continue
        x = torch.rand(2, 3, SIDE, SIDE)
        with torch.inference_mode():
            said = model.eval().cpu()(x) if wanted != "refused" else x
        said = getattr(said, "logits", said)
        torch.save({"x": x, "said": said}, folder / "expected.pt")
        told = {"name": name, "version": version, "file": file, "model": wanted}
        (folder / "told.json").write_text(json.dumps(told))
        print(f"{name} {version}: {file}")


def read(home: Path) -> int:
    from meshuffle.errors import MeshuffleError
    from meshuffle.weights import load_model, remarks_on
    from rows import append

    wrong = 0
    for told in sorted(home.glob("*/told.json")):
        case = json.loads(told.read_text())
        path, expected = told.parent / case["file"], torch.load(told.parent / "expected.pt")
        try:
            asked = None if case["model"] == "refused" else case["model"]
            network, _ = load_model(path, asked)
            with torch.inference_mode():
                found = network(expected["x"])
            found = getattr(found, "logits", found)
            far = float((found - expected["said"]).abs().max())
            result = f"the same within {far:.1e}" if far < 1e-4 else f"OTHER OUTPUTS by {far:.1e}"
            for remark in remarks_on(path, asked):
                print(f"    {remark}")
            right = far < 1e-4 and case["model"] != "refused"
        except MeshuffleError as error:
            result, right = f"refused: {error}", case["model"] == "refused"
        wrong += not right
        print(f"{'right' if right else 'WRONG'}  {case['name']} {case['version']}: {result}")
        short = result.replace(str(home), "FOLDER").partition("\n")[0]
        append("foreign_checkpoints", [{**case, "right": right, "result": short,
                                        "torch": torch.__version__}])  # fmt: skip
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.verb == "read":
        return read(asked.folder)
    write(asked.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
