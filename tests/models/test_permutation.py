import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshuffle.errors import ModelError
from meshuffle.models import ChannelShuffle, channel_permutation
from meshuffle.models.permutation import PERMUTATION_KINDS

quick = settings(deadline=None, max_examples=60)

groups_and_channels = st.tuples(st.integers(1, 9), st.integers(1, 12)).map(
    lambda pair: (pair[0], pair[0] * pair[1])
)


@given(groups_and_channels, st.sampled_from(PERMUTATION_KINDS), st.integers(0, 99))
@quick
def test_every_kind_is_a_bijection(sizes, kind, seed):
    groups, channels = sizes
    assert sorted(channel_permutation(kind, channels, groups, seed)) == list(range(channels))


@given(groups_and_channels)
@quick
def test_paper_then_inverse_is_the_identity(sizes):
    groups, channels = sizes
    paper = channel_permutation("paper", channels, groups)
    inverse = channel_permutation("inverse", channels, groups)
    assert tuple(paper[j] for j in inverse) == tuple(range(channels))


@given(groups_and_channels)
@quick
def test_paper_sends_the_channels_of_a_group_to_all_groups_in_turn(sizes):
    groups, channels = sizes
    paper = channel_permutation("paper", channels, groups)
    group_of_source = [source // (channels // groups) for source in paper]
    assert group_of_source == [j % groups for j in range(channels)]


@given(groups_and_channels)
@quick
def test_inverse_is_the_paper_with_the_complementary_groups(sizes):
    groups, channels = sizes
    assert channel_permutation("inverse", channels, groups) == channel_permutation(
        "paper", channels, channels // groups
    )


@given(st.integers(2, 9), st.integers(1, 60))
@quick
def test_a_division_with_a_remainder_is_refused_with_the_values(groups, channels):
    if channels % groups == 0:
        channels += 1
    for kind in ("paper", "inverse"):
        with pytest.raises(ModelError, match=rf"\(={channels}\).*`groups` \(={groups}\)"):
            channel_permutation(kind, channels, groups)


def test_random_follows_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = channel_permutation("random", 40, 1, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == channel_permutation("random", 40, 1, seed=1)
    assert first != channel_permutation("random", 40, 1, seed=2)


def test_a_given_list_is_kept():
    assert channel_permutation([2, 0, 1], 3, 1) == (2, 0, 1)


@pytest.mark.parametrize(
    ("perm", "message"),
    [
        ([0, 1, 1], "1 repeated, 2 missing"),
        ([0, 1], "2 missing"),
        ([0, 1, 3], "3 out of range, 2 missing"),
        ([0, 1, -1], "-1 out of range, 2 missing"),
        ([0, 1, 2, 2], "2 repeated"),
        ([], "0, 1, 2 missing"),
    ],
)
def test_a_list_that_is_no_bijection_names_the_fault(perm, message):
    with pytest.raises(ModelError, match=message):
        channel_permutation(perm, 3, 1)


@pytest.mark.parametrize("perm", [[0.0, 1.0, 2.0], ["0", "1", "2"], [None, 1, 2]])
def test_a_list_of_other_things_than_indices_is_refused(perm):
    with pytest.raises(ModelError, match="must be a list of channel indices"):
        channel_permutation(perm, 3, 1)


def test_a_long_list_of_faults_is_cut():
    with pytest.raises(ModelError, match="0, 1, 2, 3, 4 and 15 more missing"):
        channel_permutation([], 20, 1)


def test_an_unknown_kind_gets_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'inverse'"):
        channel_permutation("invers", 6, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@given(groups_and_channels, st.sampled_from((*PERMUTATION_KINDS, "list")), st.integers(0, 9))
@quick
def test_the_module_reads_input_channel_perm_j(memory_format, sizes, kind, seed):
    groups, channels = sizes
    permutation = kind
    if kind == "list":
        permutation = list(channel_permutation("random", channels, 1, seed + 100))
    shuffle = ChannelShuffle(channels, groups, permutation, seed)
    x = torch.randn(2, channels, 3, 2).contiguous(memory_format=memory_format)
    assert torch.equal(shuffle(x), x[:, list(shuffle.permutation)])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@given(st.integers(1, 12), st.sampled_from(PERMUTATION_KINDS))
@quick
def test_join_and_split_are_the_shuffle(memory_format, half, kind):
    shuffle = ChannelShuffle(2 * half, 2, kind)
    x = torch.randn(2, 2 * half, 3, 2).contiguous(memory_format=memory_format)
    expected = x[:, list(shuffle.permutation)]
    joined = shuffle.join(x[:, :half], x[:, half:])
    assert torch.equal(joined, expected)
    assert torch.equal(torch.cat(shuffle.split(x), dim=1), expected)


@pytest.mark.parametrize("kind", ["paper", "inverse"])
def test_channels_last_stays_channels_last(kind):
    shuffle = ChannelShuffle(12, 2, kind)
    x = torch.randn(2, 12, 4, 4).contiguous(memory_format=torch.channels_last)
    joined = shuffle.join(*x.chunk(2, dim=1))
    for y in (shuffle(x), joined):
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", PERMUTATION_KINDS)
def test_it_exports_to_onnx_with_a_symbolic_batch(kind, tmp_path):
    shuffle = ChannelShuffle(12, 3, kind).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        shuffle,
        (torch.randn(2, 12, 4, 4),),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    program.save(tmp_path / "shuffle.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "shuffle.onnx", providers=["CPUExecutionProvider"]
    )
    for size in (1, 2, 5):
        x = torch.randn(size, 12, 4, 4)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.equal(torch.from_numpy(y), shuffle(x))


def test_the_gradient_goes_back_to_where_the_value_came_from():
    shuffle = ChannelShuffle(6, 3, "paper")
    x = torch.zeros(1, 6, 1, 1, requires_grad=True)
    weight = torch.arange(6.0).view(1, 6, 1, 1)
    (shuffle(x) * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten()[list(shuffle.permutation)].tolist() == list(range(6))


@pytest.mark.parametrize("kind", [*PERMUTATION_KINDS, [3, 2, 1, 0]])
def test_the_module_leaves_no_trace_in_the_state_dict(kind):
    shuffle = ChannelShuffle(4, 2, kind)
    assert shuffle.state_dict() == {}
    assert list(shuffle.parameters()) == []


@pytest.mark.parametrize("kind", PERMUTATION_KINDS)
def test_an_empty_batch_passes(kind):
    shuffle = ChannelShuffle(6, 2, kind)
    assert shuffle(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    halves = torch.empty(0, 3, 4, 4)
    assert shuffle.join(halves, halves).shape == (0, 6, 4, 4)


def test_a_random_shuffle_survives_the_way_over_the_meta_device():
    with torch.device("meta"):
        shuffle = ChannelShuffle(8, 2, "random", seed=3)
    shuffle = shuffle.to_empty(device="cpu")
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(shuffle(x), ChannelShuffle(8, 2, "random", seed=3)(x))


def test_a_cast_leaves_the_index_an_index():
    shuffle = ChannelShuffle(8, 2, "random").double()
    assert shuffle(torch.randn(1, 8, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_one_group_is_the_identity_and_costs_nothing():
    x = torch.randn(1, 4, 2, 2)
    assert ChannelShuffle(4, 1, "paper")(x) is x
    assert ChannelShuffle(4, 1, "inverse")(x) is x


def test_repr_names_how_it_runs():
    assert "(3, 2)" in repr(ChannelShuffle(6, 3, "paper"))
    assert "(2, 3)" in repr(ChannelShuffle(6, 3, "inverse"))
    assert "index" in repr(ChannelShuffle(6, 3, "random"))
    assert "identity" in repr(ChannelShuffle(6, 1, "paper"))


@pytest.mark.parametrize("half", [6, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_halves_of_the_join_and_their_gradients(half: int, layout: torch.memory_format) -> None:
    """The fast path (channels-last, even) and the plain one say the same as join and chunk."""
    shuffle = ChannelShuffle(2 * half, 2)
    inputs = [
        torch.randn(2, half, 3, 4, dtype=torch.float64).contiguous(memory_format=layout)
        for _ in range(2)
    ]
    weights = torch.randn(2, 2 * half, 3, 4, dtype=torch.float64)

    def run(halves: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        a, b = (x.clone().requires_grad_() for x in inputs)
        y = torch.cat(shuffle.join_halves(a, b), 1) if halves else shuffle.join(a, b)
        (y * weights).sum().backward()
        return y.detach(), [a.grad, b.grad]

    (y, grads), (expected, expected_grads) = run(True), run(False)
    assert torch.equal(y, expected)
    assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))
