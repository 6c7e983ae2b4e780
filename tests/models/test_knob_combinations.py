"""Any combination of knobs either computes, or is refused by a ModelError that says why."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import count_macs, count_parameters, create_model

some = settings(deadline=None, max_examples=10)

kernels = st.sampled_from([1, 3, 5, 7, "auto"])
permutations = st.sampled_from(["paper", "inverse", "random"])
depths = st.tuples(*[st.integers(1, 2)] * 3)
sizes = st.integers(28, 70)

v1_knobs = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 3, 4, 8]),
        "width": st.floats(0.1, 0.6),
        "depths": depths,
        "kernel_size": kernels,
        "input_size": sizes,
        "order": st.sampled_from(["paper", "authors"]),
        "permutation": permutations,
        "se": st.booleans(),
        "in_channels": st.integers(1, 4),
        "num_classes": st.integers(1, 7),
    }
)
v2_knobs = st.fixed_dictionaries(
    {
        "stage_channels": st.lists(st.integers(4, 20).map(lambda n: 2 * n), min_size=3, max_size=3),
        "width": st.floats(0.6, 2.0),
        "depths": depths,
        "stem_channels": st.lists(st.integers(1, 8), min_size=1, max_size=3),
        "head_channels": st.integers(1, 16),
        "kernel_size": kernels,
        "branches": st.sampled_from([1, 2, "auto"]),
        "input_size": sizes,
        "permutation": permutations,
        "se": st.booleans(),
        "residual": st.booleans(),
        "in_channels": st.integers(1, 4),
        "num_classes": st.integers(1, 7),
    }
)
v2plus_knobs = st.fixed_dictionaries(
    {
        "width": st.floats(0.6, 2.0),
        "depths": st.sampled_from([(1, 1, 1, 1), (1, 2, 1, 2)]),
        "kernel_size": kernels,
        "input_size": sizes,
        "permutation": permutations,
        "se": st.booleans(),
        "in_channels": st.integers(1, 4),
        "num_classes": st.integers(1, 7),
    }
)


def assert_computes(name: str, knobs: dict) -> None:
    with torch.device("meta"):
        model = create_model(name, **knobs)
        size = knobs["input_size"]
        logits = model(torch.empty(2, knobs["in_channels"], size, size))
    assert logits.shape == (2, knobs["num_classes"])


@given(v1_knobs)
@some
def test_v1_computes_with_any_combination(knobs):
    assert_computes("shufflenet_v1_x1_0_g3", knobs)


NARROW = {
    **{"stage_channels": [8, 8, 8], "width": 0.75, "depths": (1, 1, 1), "stem_channels": [1]},
    **{"head_channels": 1, "branches": "auto", "input_size": 57, "in_channels": 1},
    "num_classes": 1,
}


@given(v2_knobs)
@example(NARROW)
@some
def test_v2_computes_with_any_combination(knobs):
    assert_computes("shufflenet_v2_x1_0", knobs)


@given(v2plus_knobs)
@settings(some, max_examples=4)
def test_v2plus_computes_with_any_combination(knobs):
    assert_computes("shufflenet_v2plus_small", knobs)


@given(
    st.dictionaries(
        st.sampled_from(
            ["groups", "width", "depths", "kernel_size", "permutation", "stem_channels"]
        ),
        st.one_of(st.integers(-2, 2), st.sampled_from(["", "auto", "paper"]), st.just([0, 1, 2])),
        min_size=1,
    )
)
@settings(some, max_examples=60)
def test_nonsense_is_refused_by_a_model_error_or_builds(knobs):
    try:
        with torch.device("meta"):
            model = create_model("shufflenet_v1_x0_25_g1", **{"depths": (1, 1, 1), **knobs})
    except ModelError as error:
        assert str(error)
    else:
        assert isinstance(model, nn.Module)


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("shufflenet_v1_x1_0_g3", {"width": 0.5}, {"width": 1.0}),
        ("shufflenet_v1_x1_0_g3", {"groups": 8}, {"groups": 8, "se": True}),
        ("shufflenet_v2_x1_0", {"depths": (4, 8, 4)}, {"depths": (4, 9, 4)}),
        ("shufflenet_v2_x1_0", {"kernel_size": 3}, {"kernel_size": "auto"}),
        ("shufflenet_v2_x1_0", {"head_channels": 1024}, {"head_channels": 2048}),
        ("shufflenet_v2plus_small", {"kernel_size": 3}, {"kernel_size": 7}),
        ("shufflenet_v2plus_small", {"se": False}, {"se": True}),
    ],
)
def test_a_knob_that_adds_work_shows_in_both_counts(name, small, large):
    with torch.device("meta"):
        less, more = (create_model(name, **knobs) for knobs in (small, large))
    assert count_parameters(less) < count_parameters(more)
    assert count_macs(less, (3, 224, 224)) < count_macs(more, (3, 224, 224))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("shufflenet_v1_x0_5_g3", {"depths": (1, 2, 1)}),
        ("shufflenet_v2_x0_5", {"depths": (1, 2, 1), "branches": "auto", "input_size": 32}),
        ("shufflenet_v2plus_small", {"depths": (1, 1, 1, 1), "kernel_size": 3}),
    ],
)
def test_a_few_steps_learn_a_few_images(name, knobs):
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    model = create_model(name, num_classes=3, seed=0, dropout=0.0, **knobs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
