"""`meshuffle predict`: predictions for images, or their features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from meshuffle.cli import Answer, from_main
from meshuffle.cli.options import Debug, Force, Json, Model, doc, say, say_remarks
from meshuffle.errors import ConfigError


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(predict)


def predict(
    target: Path,
    images: list[Path],
    /,
    *,
    out: Annotated[
        Path | None,
        doc(
            "Folder for copies with the prediction drawn; without it a video's copy goes to the "
            "current folder."
        ),
    ] = None,
    features: Annotated[
        Path | None, doc("Save each image's feature vector to a .npy file (N×F).")
    ] = None,
    nearest: Annotated[
        Path | None, doc("Folder of images: show the five most similar to each image.")
    ] = None,
    batch: Annotated[int, doc("Images per batch.")] = 64,
    plan: Annotated[
        str,
        Parameter(
            help="How to spread the work over ranks, for example dp=2, tp=2:spatial or pp=2; auto "
            "measures which number of processes is fastest, from 2,000 images on."
        ),
    ] = "auto",
    model: Model = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer | None:
    """Predict the labels, boxes, masks or values of images, or of every frame of a video.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for its published weights.
    images
        Image files, folders of them, or videos. A video gets an annotated copy and a CSV file
        with a row per frame.
    """
    say_remarks(target, model)
    if features or nearest:
        return _by_features(target, images, features, nearest, batch, model, plan)
    from meshuffle.infer.predict import predict as run_prediction
    from meshuffle.infer.video import is_video

    if videos := [path for path in images if is_video(path)]:
        return _videos(target, videos, images, out, model, plan)
    if plan == "auto":
        plan = _fastest_plan(target, images, batch, model)
    values = run_prediction(target, images, batch=batch, model=model, plan=plan, pictures=out)
    broken = [value for value in values if "error" in value]
    lines = [value.get("error") or f"{value['file']}: {value.pop('text')}" for value in values]
    if broken:
        lines.append(f"{len(broken)} of {len(values)} images could not be read")
    return from_main(Answer(values, "\n".join(lines), exit_code=2 if broken else 0))


def _videos(
    target: Path,
    videos: list[Path],
    paths: list[Path],
    out: Path | None,
    model: str | None,
    plan: str,
) -> Answer:
    """Predict the frames of videos, one after the other."""
    from meshuffle.comm.group import rank_env
    from meshuffle.infer.video import predict_video

    if len(videos) < len(paths):
        other = next(path for path in paths if path not in videos)
        raise ConfigError(f"{videos[0]} is a video and {other} is not: predict them one by one")
    if len({path.stem for path in videos}) < len(videos):
        raise ConfigError(
            "two of these videos have the same name, and their copies would too; "
            "predict them one by one"
        )
    if plan not in ("auto", "dp=1") or rank_env() is not None:
        raise ConfigError(f"--plan {plan}: a video is predicted by one process; leave it out")
    values = [
        predict_video(target, video, out or Path(), model=model, progress=say) for video in videos
    ]
    lines = []
    for value in values:
        lines += [
            f"{value['file']}: {value['frames']} frames; {value['frames_per_second']} frames/s "
            f"(the video has {value['rate']:g})",
            f"  {value['video']}, {value['csv']}",
        ]
        if value["damaged"]:
            lines.append(f"  {value['damaged']} damaged packets could not be decoded")
    broken = any(value["damaged"] for value in values)
    return Answer(values, "\n".join(lines), exit_code=2 if broken else 0)


def _fastest_plan(target: Path, images: list[Path], batch: int, model: str | None) -> str:
    from meshuffle.data.scan import image_files
    from meshuffle.deploy.spread import spread_over
    from meshuffle.weights import find_weights

    find_weights(target)  # the run first, if both are wrong
    return str(spread_over(target, model, len(image_files(images)), batch, say))


def _by_features(
    target: Path,
    images: list[Path],
    file: Path | None,
    folder: Path | None,
    batch: int,
    model: str | None,
    plan: str,
) -> Answer | None:
    """Write the images' feature vectors, or find the most similar images of a folder."""
    import numpy as np

    from meshuffle.comm.group import rank_env
    from meshuffle.files import replaced
    from meshuffle.infer import features as retrieval

    if file and folder:
        raise ConfigError("--features and --nearest: give one of them")
    if plan not in ("auto", "dp=1") or rank_env() is not None:
        raise ConfigError(f"--plan {plan}: features are computed by one process; leave it out")
    if folder:
        rows, skipped = retrieval.nearest(target, images, folder, batch=batch, model=model)
        lines = [
            f"{row['file']}:\n" + "\n".join(f"  {n['similarity']:.4f}  {n['file']}" for n in near)
            for row in rows
            if (near := row["nearest"])
        ]
        value: object = rows
    else:
        assert file is not None
        points, files, skipped = retrieval.features(target, images, batch=batch, model=model)
        with replaced(file) as temporary, temporary.open("wb") as out:
            np.save(out, points)
        lines = [f"{file}: {points.shape[0]} images × {points.shape[1]} features, in this order:"]
        lines += [f"  {name}" for name in files]
        value = {"file": str(file), "images": files, "features": points.shape[1]}
    broken = [f"skipped: {message}" for message in skipped]
    return Answer(value, "\n".join([*broken, *lines]), exit_code=2 if broken else 0)
