"""The JSON of a service, as OpenAPI describes it; what is sent is made without these classes."""

from __future__ import annotations

from pydantic import BaseModel, Field, create_model

Share = Field(ge=0, le=1)


class Problem(BaseModel):
    """What was wrong."""

    status: int = Field(ge=400, le=599, description="The HTTP status.")
    message: str


class Error(BaseModel):
    """Every answer that is no success has this form."""

    error: Problem


class State(BaseModel):
    """How the service is."""

    status: str


class Likely(BaseModel):
    """A class and its probability."""

    label: str
    probability: float = Share


class Prediction(BaseModel):
    """What is predicted of one image."""

    file: str = Field(description="The name that the image came with.")


class ClassifyPrediction(Prediction):
    """The likeliest class; `top`: the likeliest five."""

    label: str
    probability: float = Share
    top: list[Likely]


class MultilabelPrediction(Prediction):
    """The labels from probability 0.5 on, the likeliest first; and the likeliest one."""

    label: str
    probability: float = Share
    labels: list[Likely]


class Box(BaseModel):
    """A box: left, top, right, bottom in pixels of the upright image."""

    label: str
    score: float = Share
    box: list[float] = Field(min_length=4, max_length=4)


class DetectPrediction(Prediction):
    """The boxes, the best first."""

    boxes: list[Box]


class SegmentPrediction(Prediction):
    """Percent of the image by class, the largest first."""

    shares: dict[str, float]
    mask: str | None = Field(
        None, description="With mask=1: a PNG in base64; the values of its pixels are classes."
    )


class RegressPrediction(Prediction):
    """The values by target, in their units."""

    values: dict[str, float | None]


PREDICTIONS: dict[str, type[Prediction]] = {
    "classify": ClassifyPrediction,
    "multilabel": MultilabelPrediction,
    "detect": DetectPrediction,
    "segment": SegmentPrediction,
    "regress": RegressPrediction,
}


class ModelAnswer(BaseModel):
    """What is served."""

    model: str
    task: str
    classes: list[str] = Field(description="In the order of their numbers.")
    colours: list[str] = Field(description="In which the page shows them.")
    input: list[int] = Field(description="Height and width of the network's input.")
    backend: str
    limits: dict[str, float]


def answer_of(task: str) -> type[BaseModel]:
    """Return the class of what /predict answers for a task."""
    one = PREDICTIONS.get(task, Prediction)
    made: type[BaseModel] = create_model(
        "Answer",
        __doc__="What is predicted of the images, in the order in which they came.",
        model=(str, ...),
        task=(str, ...),
        predictions=(list[one], ...),  # type: ignore[valid-type]
        ms=(float, Field(ge=0, description="From the request's first byte to its answer.")),
    )
    return made
