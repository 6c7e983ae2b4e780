"""The command line as a new user and a careless one meet it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from meshuffle.cli import _Stopped, main
from meshuffle.cli.options import DATA_FORMATS
from meshuffle.cli.verify import _text
from meshuffle.data.source import FORMATS
from meshuffle.errors import Interrupted
from meshuffle.train import api
from tests.cli.conftest import FAST, Fails, make_photos

VERBS = (
    *("doctor", "models", "data", "data check", "verify", "train", "eval", "predict", "export"),
    *("bench", "serve"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of our own, and forget what `--json` and `--debug` leave behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("MESHUFFLE_QUIET_STDOUT", "MESHUFFLE_DEBUG"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    (tmp_path / "fast.toml").write_text(FAST)
    return tmp_path


def shell(*arguments: str, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshuffle", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: meshuffle {verb}")


def test_no_help_text_is_a_fragment(capsys: pytest.CaptureFixture[str]) -> None:
    """A text that begins with "Of" leans on the option's name instead of saying what it does."""
    for verb in VERBS:
        assert main([*verb.split(), "--help"]) == 0
        assert not re.search(r"  Of ", capsys.readouterr().out), verb


@pytest.mark.parametrize("verb", ["train", "data check"])
def test_help_lists_every_data_format(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert {*DATA_FORMATS, "folder"} == set(FORMATS)  # `folder:PATH` is written as the PATH alone
    for text in ("digits", "a folder", *(f"{name}:" for name in DATA_FORMATS)):
        assert text in out


def test_help_and_version_without_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert verb.split()[0] in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("meshuffle ")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from meshuffle.cli import main; main(['train', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("trian digits", 'Did you mean "train"'),
        ("train digits --epoch 3", "--epoch. Did you mean --epochs"),
        ("train digits --epochs three", "three"),
        ("train digits --epochs 0", "--epochs 0: must be at least 1"),
        ("train digits --optimizer sdg", "sdg"),
        ("train digit", "did you mean 'digits'"),
        ("train imagnet:/tmp", "did you mean 'imagenet'"),
        ("train", "DATA is missing"),
        ("train digits --config none.toml", "No such file"),
        ("train digits --model shufflenet_v2_x1", "did you mean"),
        ("train digits --model timm:resnet1", "did you mean"),
        ("train digits --knobs.group 3", "no knob `group`"),
        ("train digits --plan pp=2,mb=40 --batch 32", "32 images for 40 micro-batches"),
        ("train digits --plan pp=2 --accumulate 2", "both say how many micro-batches"),
        ("train digits --plan pp=2 --compile on", "stages are not compiled yet"),
        ("train digits --plan dp=2:central,tp=2", "central updates know no tp"),
        ("train digits --plan dq=2", "the parts are dp, tp, pp"),
        ("train digits --plan none.json", "No such file"),
        ("train digits --plan dp=3 --batch 2", "use --batch 3 or more"),
        ("train digits --freeze until:stage9", "no such layer"),
        ("train digits --from nowhere", "no such run folder or weights file"),
        ("train digits --mixup -1", "mixup (=-1.0) must be in"),
        ("train digits --repeats 3 --batch 8", "must be divisible by repeats"),
        ("train --resume nowhere", "is it a run folder"),
        ("eval nowhere", "no such run folder"),
        ("predict nowhere a.png", "no such run folder"),
        ("models nothing-like-it", "no model of ours matches"),
        ("data check nowhere", "no such folder"),
        ("simulate --model x", "does not exist yet"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    command: str, says: str, fails: Fails, here: Path
) -> None:
    assert says in fails(*command.split())
    assert not (here / "runs").exists()  # nothing is left of a run that never began


def test_no_gpu(fails: Fails, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device 'cuda' is not available" in fails("train", "digits", "--device", "cuda")
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("with_report")
def test_own_photos_twice(photos: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run gets a folder of its own; its path is the first and the last line."""
    for number in (1, 2):
        assert main(["train", str(photos), "--config", "fast.toml"]) == 0
        lines = capsys.readouterr().out.splitlines()
        run = here / "runs" / f"shufflenet_v2_x0_5-photos-{number}"
        assert lines[0] == lines[-1] == str(run)
        assert any(line.startswith("epoch 1/1  loss") for line in lines)
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("config.toml", "env.json", "plan.json", "log.jsonl", "metrics.csv", "report.html"),
        *("plots", "weights", "state", "tensorboard", "result.json"),
    }


def test_out_that_exists(trained: Path, photos: Path, fails: Fails) -> None:
    before = sorted(trained.rglob("*"))
    line = fails("train", str(photos), "--config", "fast.toml", "--out", str(trained))
    assert f"--resume {trained}" in line
    assert sorted(trained.rglob("*")) == before


def test_out_that_cannot_be_made(photos: Path, fails: Fails, here: Path) -> None:
    (here / "runs").write_text("a file")
    line = fails("train", str(photos), "--config", "fast.toml")
    assert "cannot make the run folder" in line


@pytest.mark.parametrize(
    "extra", [["--epochs", "9"], ["--lr", "0.1"], ["digits"], ["--config", "fast.toml"]]
)
def test_resume_takes_no_other_settings(trained: Path, fails: Fails, extra: list[str]) -> None:
    line = fails("train", "--resume", str(trained), *extra)
    assert f"leave out: {extra[0]}" in line


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("{", "not JSON"),
        ('{"dp": 0}', "at least 1"),
        ('{"pp": 2, "mb": 9}', "8 images for 9 micro-batches"),
        ('{"pp": 2, "cuts": ["a", "b"]}', "2 stages have 1 cuts, not 2"),
        ('{"dp": 64}', "64 ranks share a batch of 8"),
        ('{"rank": 2}', "unknown key 'rank'"),
    ],
)
def test_a_plan_edited_into_nonsense(
    trained: Path, here: Path, fails: Fails, plan: str, says: str
) -> None:
    run = here / "moved"
    shutil.copytree(trained, run)
    (run / "plan.json").write_text(plan)
    assert says in fails("train", "--resume", str(run))


def test_a_run_that_was_moved_goes_on(trained: Path, here: Path) -> None:
    shutil.copytree(trained, here / "moved")
    assert main(["train", "--resume", "moved"]) == 0


def test_one_class(here: Path, fails: Fails) -> None:
    root = make_photos(here / "lonely", ("red",))
    assert "only one class, 'red'" in fails("train", str(root))


def break_some(root: Path) -> list[str]:
    """Add three files that no decoder reads, and return their names."""
    folder = root / "train" / "red"
    whole = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    return ["truncated.png", "empty.jpg", "text.jpg"]


@pytest.mark.usefixtures("with_report")
def test_broken_files_are_named_once_and_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = break_some(make_photos(here / "torn", ("blue", "red")))
    assert main(["train", "torn", "--config", "fast.toml", "--epochs", "3", "--json"]) == 0
    captured = capsys.readouterr()
    for name in broken:
        assert captured.err.count(name) == 1
        line = next(line for line in captured.err.splitlines() if name in line)
        assert line.startswith(f"skipped: {here / 'torn'}")
    assert "3 unreadable images were skipped" in captured.err
    result = json.loads(captured.out)
    assert result["skipped_inputs"] == 3
    report = (Path(result["run"]) / "report.html").read_text()
    assert "3 could not be read." in report
    assert all(report.count(f"{name}: ") >= 1 for name in broken)


def test_strict_stops_at_a_broken_file(here: Path, fails: Fails) -> None:
    broken = break_some(make_photos(here / "torn", ("blue", "red")))
    line = fails("train", "torn", "--config", "fast.toml", "--strict")
    assert any(name in line for name in broken)


def one_json_line(capsys: pytest.CaptureFixture[str]) -> Any:
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_json_of_train(photos: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(photos), "--config", "fast.toml", "--json"]) == 0
    value = one_json_line(capsys)
    assert list(value) == [
        *("run", "metrics", "skipped_inputs", "predicted_step_ms", "measured_step_ms"),
    ]
    assert Path(value["run"]).parent == here / "runs"
    assert 0 <= value["metrics"]["val"]["top1"] <= 100
    assert value["measured_step_ms"] > 0


def test_json_of_eval_and_predict(
    trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained), "--json"]) == 0
    value = one_json_line(capsys)
    assert {"task", "num_samples", "metrics"} <= value.keys()
    assert (value["task"], value["num_samples"]) == ("classify", 8)
    assert value["metrics"].keys() == {"top1", "loss"}
    result = json.loads((trained / "result.json").read_text())
    assert value["metrics"]["top1"] == pytest.approx(result["splits"]["val"]["top1"])
    image = str(photos / "val" / "red" / "0.png")
    assert main(["predict", str(trained), image, "--json"]) == 0
    (guess,) = one_json_line(capsys)
    assert list(guess) == ["file", "label", "probability", "top"]
    assert guess["file"] == image
    assert guess["label"] in ("blue", "red")
    assert 0.5 <= guess["probability"] <= 1


def test_json_of_the_other_verbs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "v2_x1_0", "--json"]) == 0
    assert one_json_line(capsys)[0]["name"] == "shufflenet_v2_x1_0"
    assert main(["doctor", "--json"]) == 0
    assert "torch" in one_json_line(capsys)
    assert main(["data", "check", str(photos), "--json"]) == 0
    assert one_json_line(capsys)


def test_predict_says_which_image_is_broken(
    trained: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.png").write_text("no picture")
    good = str(photos / "val" / "red" / "0.png")
    assert main(["predict", str(trained), good, "bad.png"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{good}: ")
    assert lines[1].startswith("bad.png: ") and lines[1].count("bad.png") == 1
    assert lines[2] == "1 of 2 images could not be read"


def test_wrong_images_and_splits(trained: Path, here: Path, fails: Fails) -> None:
    (here / "nothing").mkdir()
    assert "no image in this folder" in fails("predict", str(trained), "nothing")
    assert "no such file or folder" in fails("predict", str(trained), "nowhere.png")
    assert "has no test split" in fails("eval", str(trained), "--split", "test")
    assert "classes are unknown to the model" in fails("eval", str(trained), "--data", "digits")


def test_show_config_trains_nothing(
    photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(photos), "--config", "fast.toml", "--lr", "0.5", "--show-config"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for line in ("lr = 0.5  # flag", "batch = 8  # file", "momentum = 0.9  # default"):
        assert line in out.splitlines()
    assert not (here / "runs").exists()


def test_a_fault_of_ours_is_one_line_and_debug_shows_where(
    photos: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(*_: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(api, "train", faulty)
    line = fails("train", str(photos), exit_code=1)
    assert line == (
        "error: unexpected ZeroDivisionError: two; --debug shows where. Please report it"
    )
    assert main(["train", str(photos), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_eval_names_no_split_of_other_data_without_splits(
    trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained), "--data", str(photos / "val")]) == 0
    assert capsys.readouterr().out.startswith(f"{photos / 'val'}: top-1 ")


def test_where_a_verb_was_stopped_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_printed, says in ((True, ""), (False, "stopped here\n")):
        stopped = Interrupted("stopped here", signal.SIGTERM, is_printed=is_printed)
        monkeypatch.setattr(api, "train", Mock(side_effect=stopped))
        assert main(["train", "digits"]) == 143
        assert capsys.readouterr().err == says
    monkeypatch.setattr("meshuffle.deploy.serve.require", Mock(side_effect=_Stopped))
    assert main(["serve", "run"]) == 143
    assert capsys.readouterr().err == "error: stopped before the service was ready\n"


def test_other_libraries_are_silent() -> None:
    """Here and in the ranks, which inherit the environment."""
    code = "import logging, subprocess, sys; from meshuffle.cli import main; main(); "
    code += "import torch; from transformers.utils import logging as theirs; "
    code += "level = logging.getLogger('torch.utils._pytree').level; "
    code += "print(level, theirs.is_progress_bar_enabled())"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("40 False", "")


@pytest.mark.parametrize("num", [0, 3])
def test_verify_says_what_the_floor_judged(num: int) -> None:
    verdict = Mock(
        **{"num_floor_tensors": num, "plan": "dp=2", "parameter_bytes_fraction": 1.0},
        **{"sent_bytes_predicted": 1, "sent_bytes_measured": 1, "median_ratio": None},
        **{"first_diverging": None, "worst_tensors": [], "whole_ops": []},
    )
    assert ("judged by the floor" in _text(verdict)) is bool(num)


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_what_the_system_says(
    photos: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails,
    error: BaseException, exit_code: int, says: str,
) -> None:  # fmt: skip
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(api, "train", failing)
    assert fails("train", str(photos), exit_code=exit_code) == says


def test_code_named_in_a_file_needs_its_name_repeated(
    photos: Path, here: Path, fails: Fails
) -> None:
    (here / "own_net.py").write_text("raise SystemExit('imported')\n")
    (here / "own.toml").write_text('model = "own_net:tiny"\n')
    assert "repeat its name: --model own_net:tiny" in fails(
        "train", str(photos), "--config", "own.toml"
    )


def test_a_closed_pipe_is_no_error() -> None:
    """`meshuffle models | head -1`"""
    command = f"{sys.executable} -m meshuffle models v2plus | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_a_model_split_within_its_layers(
    photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks train, go on, and leave a run like any other."""
    plan = ["--plan", "tp=2:channel,threads=1"]
    done = shell("train", str(photos), "--config", "fast.toml", *plan, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    line = done.stdout.splitlines()[1]
    assert line.startswith("plan dp=1,tp=2:channel,threads=1: 100 % of the FLOPs are split, 50")
    assert line.endswith("MB sent a step within replicas")
    assert main(["train", "--resume", "run"]) == 0
    assert "all epochs are done" in Path("run/log.jsonl").read_text()
    capsys.readouterr()
    assert main(["eval", "run", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    stored = json.loads(Path("run/result.json").read_text())
    assert judged["metrics"]["top1"] == stored["splits"]["val"]["top1"]
    images = sorted(map(str, (photos / "val").rglob("*.png")))
    assert main(["predict", "run", *images, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(images)


def test_a_process_of_its_own_without_a_terminal(photos: Path, here: Path) -> None:
    done = shell("train", str(photos), "--config", "fast.toml")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.splitlines()[0] == done.stdout.splitlines()[-1]
    assert os.path.isdir(done.stdout.splitlines()[0])  # noqa: PTH112


def test_sigterm_ends_a_verb_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meshuffle", "verify", "--model", "torchvision:resnet50"]
    process = subprocess.Popen(
        [*command, "--plan", "tp=2", "--input", "3x224x224", "--batch", "64"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if any(tmp_path.glob("meshuffle-verify-*/reference-*/initial.safetensors")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err == "error: stopped\n"
    assert not list(tmp_path.glob("meshuffle-verify-*"))
