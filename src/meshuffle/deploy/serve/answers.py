"""The JSON of a service, for OpenAPI alone: answers are built without these classes."""

from __future__ import annotations

from pydantic import BaseModel, Field, create_model

Share = Field(ge=0, le=1)


class Problem(BaseModel):
    """Why a request failed."""

    status: int = Field(ge=400, le=599, description="The HTTP status.")
    message: str


class Error(BaseModel):
    """The form of every answer that reports a failure."""

    error: Problem


class State(BaseModel):
    """The state of the service."""

    status: str


class Likely(BaseModel):
    """A class and its probability."""

    label: str
    probability: float = Share


class Prediction(BaseModel):
    """The prediction for one image."""

    file: str = Field(description="The name of the uploaded file.")


class ClassifyPrediction(Prediction):
    """The most probable class, and in `top` the five most probable ones."""

    label: str
    probability: float = Share
    top: list[Likely]


class MultilabelPrediction(Prediction):
    """The most probable label, and in `labels` all from probability 0.5 on, best first."""

    label: str
    probability: float = Share
    labels: list[Likely]


class Box(BaseModel):
    """A box as left, top, right, bottom in pixels of the upright image."""

    label: str
    score: float = Share
    box: list[float] = Field(min_length=4, max_length=4)


class DetectPrediction(Prediction):
    """The boxes, best first."""

    boxes: list[Box]


class SegmentPrediction(Prediction):
    """The percentage of the image that each class covers, largest first."""

    shares: dict[str, float]
    mask: str | None = Field(
        None, description="With mask=1: a PNG in base64 whose pixel values are class numbers."
    )


class RegressPrediction(Prediction):
    """The value of each target, in its own unit."""

    values: dict[str, float | None]


PREDICTIONS: dict[str, type[Prediction]] = {
    "classify": ClassifyPrediction,
    "multilabel": MultilabelPrediction,
    "detect": DetectPrediction,
    "segment": SegmentPrediction,
    "regress": RegressPrediction,
}


class ModelAnswer(BaseModel):
    """The model that is served."""

    model: str
    task: str
    classes: list[str] = Field(description="The names, in the order of the class numbers.")
    colours: list[str] = Field(description="The colour of each class on the page.")
    input: list[int] = Field(description="Height and width of the network's input.")
    backend: str
    limits: dict[str, float]


def answer_of(task: str) -> type[BaseModel]:
    """Return the schema of what /predict answers for a task."""
    one = PREDICTIONS.get(task, Prediction)
    made: type[BaseModel] = create_model(
        "Answer",
        __doc__="The predictions, in the order of the images in the request.",
        model=(str, ...),
        task=(str, ...),
        predictions=(list[one], ...),  # type: ignore[valid-type]
        ms=(float, Field(ge=0, description="The time from the request to its answer.")),
    )
    return made
