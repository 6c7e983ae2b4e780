"""The checker can fail: planted faults fire, are found, and are named (DESIGN 4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from meshuffle.verify import api
from meshuffle.verify.job import Job
from meshuffle.verify.reference import Reference
from tests.ranks import PYTHON_PATH
from tests.verify.faults import CASES

_NAMED = {
    "skip_an_all_reduce": "aten.add.Tensor (add, as psum)",
    "skip_an_all_reduce_backward": "gradient at table: ",
    "mean_for_sum": "head: aten.linear.default (linear, as psum)",
    "drop_a_shuffle": "block.depthwise: aten.conv2d.default (conv2d_2, as exchange)",
    "forget_a_halo_row": "block.depthwise: ",
    "stale_buffer": "buffers/block.norm.running_mean",
    "double_count_of_the_last_batch": "gradient at head: ",
    "one_ranks_mask": "drop: aten.dropout.default",
    "skip_the_gradients": "gradients/",
    "nobody_shares_a_shard": "loss/2",
    "nobody_shares_the_update": "loss/2",
    "the_exchange_of_a_host_is_late": "loss/2",
    "evaluated_in_train_mode": "eval/0",
    "a_stage_gets_half": "block.",
    "a_stage_gets_the_wrong_micro_batch": "outputs/0",
    "a_gradient_does_not_cross": "gradient at block.",
    "a_tied_parameter_alone": "gradients/table.weight",
}


def run(names: Sequence[str], folder: Path, **options: Any) -> dict[str, api.Verdict]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("MESHUFFLE_TEST_FIRED", str(folder)),
            ("PYTHONPATH", PYTHON_PATH),
            ("OMP_NUM_THREADS", "1"),
            ("TORCH_CPP_LOG_LEVEL", "ERROR"),
            ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5"),
        ):
            patch.setenv(name, value)
        patch.setattr(api, "_RANK_MODULE", "tests.verify.faults")
        cases = [(f"tests.verify.faults:{name}", *CASES[name][1:]) for name in names]
        verdicts = api.verify(cases, **({"timeout_s": 60} | options))
        return dict(zip(names, verdicts, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fired")


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> Iterator[dict[str, api.Verdict]]:
    yield run([*_NAMED, "a_rank_raises", "nothing"], folder)


@pytest.mark.parametrize("name", _NAMED)
def test_a_fault_is_found_and_named(
    name: str, verdicts: dict[str, api.Verdict], folder: Path
) -> None:
    verdict = verdicts[name]
    assert (folder / name).exists(), "the fault did not fire"
    assert verdict.error is None and not verdict.passed and verdict.exit_code == 1
    assert _NAMED[name] in str(verdict.first_diverging)
    assert verdict.worst_tensor in verdict.failed_tensors


def test_a_dropped_exchange_also_shows_in_the_bytes(verdicts: dict[str, api.Verdict]) -> None:
    verdict = verdicts["drop_a_shuffle"]
    assert verdict.sent_bytes_predicted != verdict.sent_bytes_measured


def test_a_rank_that_raises_is_named_and_the_next_case_runs(
    verdicts: dict[str, api.Verdict],
) -> None:
    assert verdicts["a_rank_raises"].error == "rank 1 of 2 at tp.psum: planted"
    assert verdicts["nothing"].passed


def test_the_error_of_rounded_weights_excuses_no_fault_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def own_difference(job: Job, reference: Reference, *, num_rounded: int = 0) -> dict[str, float]:
        asked.append((job.model.rpartition(":")[2], num_rounded))
        return reference_own_difference(job, reference, num_rounded=num_rounded)

    reference_own_difference = api.own_difference
    monkeypatch.setattr(api, "own_difference", own_difference)
    small = ("skip_an_all_reduce_backward", "forget_a_halo_row", "stale_buffer", "one_ranks_mask")
    found = run([*small, "nothing"], tmp_path, dtype="float32")
    assert found.pop("nothing").passed and ("nothing", 0) in asked and ("nothing", 8) not in asked
    for name, verdict in found.items():
        assert (tmp_path / name).exists(), "the fault did not fire"
        assert (name, 8) in asked
        assert verdict.error is None and not verdict.passed and verdict.exit_code == 1
        assert _NAMED[name] in str(verdict.first_diverging)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_waited_for_so_long_and_no_longer(folder: Path) -> None:
    found = run(["a_rank_does_not_come", "nothing"], folder, timeout_s=6)
    error = found["a_rank_does_not_come"].error
    assert error is not None and error.startswith("rank 0 of 2 at tp.psum") and "6000ms" in error
    assert found["nothing"].passed
