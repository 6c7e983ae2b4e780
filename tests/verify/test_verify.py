"""Real launches: few, each with many cases."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import meshuffle
from meshuffle.cli import main
from meshuffle.errors import InputError, ModelError
from meshuffle.planner.plan import SCHEDULES
from meshuffle.verify.api import verify
from meshuffle.verify.job import Job, _Unfilled, build_model, join_rows, loss_of, rows_of
from meshuffle.verify.reference import squared_difference
from tests.ranks import PYTHON_PATH
from tests.verify import models

IMAGE = "3x16x16"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun` leaves variables behind, on purpose; not here."""
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "1" if name == "OMP_NUM_THREADS" else "ERROR")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)


def test_two_ranks_and_cases_that_fail_between_good_ones() -> None:
    verdicts = verify(
        [
            (models.net, "tp=2:batch", IMAGE),
            (models.branching, "tp=2", "8"),
            (models.noisy, "tp=2", "8"),
            (models.wide, "tp=2:channel", IMAGE),
            (models.mortal, "tp=2", IMAGE),
            (models.net, "tp=2:spatial", IMAGE, 7),
            (models.tokens, "tp=2", "6:int"),
            (models.tokens, "tp=2:channel", "6:int"),
            (models.net, "dp=2", IMAGE),
            (models.net, "dp=5", IMAGE),
            (lambda: models.Net(), "tp=2", IMAGE),
            (models.placed, "tp=2", "6:int"),
        ]
    )
    errors = [v.error for v in verdicts]
    assert [e is None for e in errors] == [
        *(True, False, False, True, False),
        *(True, True, True, True, False, False, True),
    ]
    assert "cannot capture Branching" in str(errors[1]) and verdicts[1].exit_code == 2
    assert "poisson" in str(errors[2])
    assert errors[4] == "rank 1 of 2 was killed by signal 9" and verdicts[4].exit_code == 1
    assert "leaves a replica 1 samples" in str(errors[9])
    assert "top level" in str(errors[10])
    for verdict in (v for v in verdicts if v.error is None):
        assert verdict.passed, verdict
        assert verdict.worst_relative_error is not None and verdict.worst_relative_error < 1e-13
        assert verdict.sent_bytes_predicted == verdict.sent_bytes_measured
    split = verdicts[3]
    assert split.sharded_flops_fraction == 1.0 and split.busiest_over_mean == 1.0
    assert split.parameter_bytes_fraction is not None and split.parameter_bytes_fraction < 0.51
    assert split.whole_ops == [] and split.failed_tensors == []


@pytest.mark.parametrize(("dp", "tp"), [(1, 3), (2, 2)])
def test_other_numbers_of_ranks_and_an_uneven_batch(dp: int, tp: int) -> None:
    plans = [f"dp={dp},tp={tp}{kind}" for kind in ("", ":channel", ":spatial", ":batch")]
    cases = [(models.net, plan, IMAGE, 7) for plan in plans]
    for verdict in verify([*cases, (models.tokens, plans[0], "6:int", 7)]):
        assert verdict.passed, verdict


def test_pipelines_of_every_schedule_and_micro_batches_of_unequal_size() -> None:
    schedules = [f"pp=2:{kind},mb=4" for kind in SCHEDULES]
    cases = [(models.net, plan, IMAGE, 9) for plan in (*schedules, "pp=2,mb=3", "tp=2,mb=3")]
    for verdict in verify(
        [*cases, (models.tied, "pp=2", "6:int"), (models.tokens, "pp=2", "6:int")]
    ):
        assert verdict.passed, verdict
        assert verdict.sent_bytes_predicted == verdict.sent_bytes_measured


@pytest.mark.parametrize("plan", ["dp=2,pp=2,mb=2", "tp=2,pp=2:zbv,mb=4"])
def test_hybrids(plan: str) -> None:
    for verdict in verify([(models.net, plan, IMAGE, 9), (models.tied, plan, "6:int", 10)]):
        assert verdict.passed, verdict


def test_float32_against_one_device_and_one_rank() -> None:
    for verdict in verify(
        [
            (models.net, "tp=2", IMAGE),
            (models.wide, "tp=2:channel", IMAGE),
            (models.net, "dp=1", IMAGE),
        ],
        dtype="float32",
    ):
        assert verdict.passed, verdict
        assert verdict.median_ratio is not None and verdict.median_ratio <= 1.5


def test_the_folder_is_the_function() -> None:
    with pytest.raises(InputError, match="float64 and float32"):
        meshuffle.verify([], dtype="float16")
    assert meshuffle.verify([]) == []


@pytest.mark.usefixtures("real_torchrun")
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tests.verify.models:wide", "--plan", "tp=2:channel", "--input", IMAGE]
    assert main(["verify", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    fixed = (
        *("passed", "plan", "dtype", "worst_relative_error", "worst_tensor", "num_floor_tensors"),
        *("sharded_flops_fraction", "sent_bytes_predicted", "sent_bytes_measured"),
    )
    assert set(fixed) <= set(found)
    assert found["passed"] is True and found["plan"] == "tp=2:channel"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--plan pp=2,mb=8 --batch 6", "leaves a micro-batch 0 samples"),
        ("--plan pp=4:interleaved-1f1b,mb=9 --batch 64", "give another mb, or pp=4:1f1b"),
        ("--plan pp=999,mb=1", "runs all 999 ranks on this host"),
        ("--plan dp=2:central,tp=2", "central updates know no tp"),
        ("--plan tq=2", "unknown part 'tq'"),
        ("--plan dp=4 --batch 6", "a batch of 6 leaves a replica 1 samples"),
        ("--plan tp=4:batch --batch 3", "3 samples of a replica cannot be split over 4 ranks"),
        ("--plan tp=2 --input 3by4", "input '3by4'"),
        ("--plan tp=2 --input 12:int", "has no nn.Embedding"),
        ("--plan tp=2 --model tests.verify.models:branching --input 8", "cannot capture"),
        ("--plan tp=2 --model tests.verify.models:nothing", "no function nothing"),
        ("--plan tp=2 --dtype float16", "float16"),
    ],
)
def test_bad_input_gets_one_line(
    options: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--model" in options else ["--model", "tests.verify.models:net"]
    assert main(["verify", *given, *options.split()]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert says in captured.err and not captured.out


def test_parts_of_the_loss_add_up() -> None:
    """Over replicas, with a classifier and without, and with several rows per sample."""
    torch.manual_seed(0)
    job = Job("", "", "", 5, "float64", 0)
    samples = torch.arange(5)
    for x in (torch.randn(5, 3), torch.randn(10, 3, 2), torch.randn(4, 5)):
        dim = [5, 10].index(x.shape[0]) * 0 if x.shape[0] != 4 else 1
        whole = loss_of([x], [dim], samples, job)
        parts = [
            loss_of([rows_of(x, dim, part, 5)], [dim], part, job) for part in samples.split([3, 2])
        ]
        assert float(sum(parts)) == pytest.approx(float(whole))


def test_infinities_are_equal_to_themselves() -> None:
    a = torch.tensor([1.0, -torch.inf, torch.inf])
    assert squared_difference(a, a.clone()) == 0
    assert squared_difference(a, torch.tensor([1.0, -torch.inf, 2.0])) == float("inf")


def test_a_rank_builds_a_model_without_filling_its_parameters() -> None:
    with _Unfilled():
        layer = nn.Linear(3, 3)
        layer.weight = nn.Parameter(torch.zeros(3, 3))
        nn.init.kaiming_uniform_(layer.weight)
        nn.init.trunc_normal_(layer.weight)
        layer.weight.requires_grad_(False).fill_(1.0)
    assert not layer.weight.any() and not layer.weight.requires_grad
    job = Job("torchvision:swin_t", "tp=2", "3x64x64", 2, "float64", 0)
    whole, empty = build_model(job, torch.float64), build_model(job, torch.float64, filled=False)
    sizes = [[(n, p.shape, p.dtype) for n, p in m.named_parameters()] for m in (whole, empty)]
    assert sizes[0] == sizes[1]
    assert all(map(torch.equal, whole.buffers(), empty.buffers()))


def test_complex_and_whole_numbers_keep_their_kind() -> None:
    job = Job(f"{__name__}:Kinds", "tp=2", "3", 2, "float64", 0)
    for filled in (True, False):
        kept = dict(build_model(job, torch.float64, filled=filled).state_dict())
        assert {name: x.dtype for name, x in kept.items()} == {
            "weight": torch.float64,
            "count": torch.int64,
            "phase": torch.complex64,
            "turn": torch.complex64,
        }
        assert kept["turn"].tolist() == [1j] and kept["count"].tolist() == [7]


class Kinds(nn.Module):
    """A module with tensors of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.count = nn.Parameter(torch.tensor([7]), requires_grad=False)
        self.phase = nn.Parameter(torch.tensor([1j]))
        self.register_buffer("turn", torch.tensor([1j]))


def test_samples_by_samples_are_refused_in_parts() -> None:
    parts = [torch.ones(3, 3), torch.ones(2, 2)]
    with pytest.raises(ModelError, match=r"sizes \[3, 3\] and \[2, 2\] .* dp=1 and mb=1"):
        join_rows(parts, None, [torch.arange(3), torch.arange(2)], 5)
