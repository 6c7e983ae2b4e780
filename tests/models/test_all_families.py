"""What holds for every model of ours, tried on shallow members of each family."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from meshuffle.models import count_macs, create_model

SHALLOW = {
    "v1": ("shufflenet_v1_x0_5_g3", {"depths": (1, 2, 1)}),
    "v1-authors": (
        "shufflenet_v1_x0_5_g8_se",
        {"depths": (1, 2, 1), "order": "authors", "permutation": "inverse"},
    ),
    "v1-random": (
        "shufflenet_v1_x0_25_g4",
        {"depths": (1, 2, 1), "permutation": "random", "drop_path": 0.2},
    ),
    "v2": ("shufflenet_v2_x0_5", {"depths": (1, 2, 1)}),
    "v2-all-knobs": (
        "shufflenet_v2_x0_5_se",
        {
            "depths": (1, 2, 1),
            "residual": True,
            "drop_path": 0.2,
            "dropout": 0.1,
            "branches": "auto",
            "kernel_size": "auto",
            "input_size": 64,
            "permutation": "random",
        },
    ),
    "v2-four-stages": (
        "shufflenet_v2_164_se",
        {"stage_channels": (16, 32, 64, 128), "depths": (1, 2, 1, 1), "head_channels": 64},
    ),
    "v2plus": ("shufflenet_v2plus_small", {"depths": (1, 2, 1, 2), "kernel_size": 5}),
}
families = pytest.mark.parametrize("case", SHALLOW)


def quick_for(*quick: str) -> pytest.MarkDecorator:
    """Parametrise over all families; those that are not in `quick` are slow."""
    rest = [pytest.param(case, marks=pytest.mark.slow) for case in SHALLOW if case not in quick]
    return pytest.mark.parametrize("case", [*quick, *rest])


def shallow(case: str, **more) -> nn.Module:
    name, knobs = SHALLOW[case]
    return create_model(name, num_classes=10, seed=0, **knobs, **more)


@families
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (28, 28), (33, 65)])
def test_sizes_from_small_digits_up(case, size):
    model = shallow(case)
    for training in (True, False):
        model.train(training)
        assert model(torch.randn(2, 3, *size)).shape == (2, 10)


@families
def test_another_number_of_input_channels(case):
    assert shallow(case, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)


@families
def test_channels_last_gives_the_same_numbers(case):
    model = shallow(case).double().eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    actual = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@families
def test_every_parameter_gets_a_gradient(case):
    torch.manual_seed(0)
    model = shallow(case)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def without_batch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)
    return module


@families
def test_an_empty_batch_passes_forward_and_backward(case):
    model = without_batch_norm(shallow(case))
    x = torch.empty(0, 3, 32, 32, requires_grad=True)
    logits = model(x)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@quick_for("v1", "v2", "v2plus")
def test_torch_export_keeps_the_batch_symbolic(case):
    model = shallow(case).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    count_macs(model, (3, 64, 64))  # counting must not disturb a later export
    program = torch.export.export(model, (torch.randn(3, 3, 64, 64),), dynamic_shapes=({0: batch},))
    exported = program.module()
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 64, 64)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@quick_for("v1", "v2-all-knobs")
def test_torch_export_in_training_keeps_the_batch_symbolic(case):
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = ({0: batch},)
    program = torch.export.export(
        shallow(case), (torch.randn(3, 3, 64, 64),), dynamic_shapes=shapes
    )
    model = shallow(case)
    exported = program.module()
    for size in (2, 5):
        x = torch.randn(size, 3, 64, 64)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


@quick_for("v1", "v2")
def test_an_export_traced_in_one_memory_format_is_right_in_the_other(case):
    model = shallow(case).eval()
    x = torch.randn(2, 3, 64, 64)
    traced = torch.export.export(model, (x.contiguous(memory_format=torch.channels_last),))
    torch.testing.assert_close(traced.module()(x), model(x), rtol=1e-4, atol=1e-5)


@quick_for("v2")
def test_onnx_runs_at_every_batch_size(case, tmp_path):
    model = shallow(case).eval()
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 64),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 64, 64)
        (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(actual, model(x).detach().numpy(), rtol=1e-3, atol=1e-4)


@families
def test_the_meta_device_and_back(case):
    with torch.device("meta"):
        empty = shallow(case)
    model = shallow(case).eval()
    rebuilt = empty.to_empty(device="cpu").eval()
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["shufflenet_v1_x1_0_g8", "shufflenet_v2_x1_0", "shufflenet_v2_50", "shufflenet_v2plus_large"],
)
def test_the_full_depth_exports_with_a_symbolic_batch(name):
    model = create_model(name, num_classes=10, seed=0).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-3, atol=1e-4)
