"""The HTTP side of a replica: routes, errors in one form, and their OpenAPI description."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshuffle import __version__
from meshuffle.deploy.serve import metrics as counted
from meshuffle.deploy.serve.answers import Error, ModelAnswer, State, answer_of
from meshuffle.deploy.serve.limits import Refused
from meshuffle.deploy.serve.pages import api_page, start_page
from meshuffle.deploy.serve.service import Service
from meshuffle.deploy.serve.upload import MULTIPART, RAW_TYPES, read_upload
from meshuffle.tasks.card import Card
from meshuffle.tasks.mask_picture import palette

_REFUSALS: Mapping[int, str] = {
    400: "The request is malformed, or its body is empty.",
    401: "The bearer token is missing or wrong.",
    413: "Too many bytes, pixels or images.",
    415: "The content type, or the format of an image, is not supported.",
    422: "An image or a parameter cannot be read.",
    429: "Too many requests at once; try again later.",
    500: "The service failed; its log says why.",
    503: "The service is starting or stopping.",
    504: "The request took longer than the limit.",
}
_PATHS = ("/", "/docs", "/openapi.json", "/predict", "/model", "/health", "/ready", "/metrics")
_BEARER = HTTPBearer(auto_error=False, description="The token of --token-file.")
_BINARY = {"type": "string", "format": "binary"}
_BODY = {
    "required": True,
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "minItems": 1, "items": _BINARY}},
            }
        },
        **{kind: {"schema": _BINARY} for kind in RAW_TYPES},
    },
}


@dataclass(frozen=True)
class About:
    """The description of a service; `backend` names what executes the network."""

    card: Card
    backend: str = ""

    def to_dict(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """Return the answer of /model."""
        card = self.card
        return {
            "model": card.model,
            "task": card.task,
            "classes": [card.titles.get(name, name) for name in card.classes],
            "colours": [f"#{bytes(palette()[i % 255]).hex()}" for i in range(len(card.classes))],
            "input": list(card.preprocess.size),
            "backend": self.backend,
            "limits": dict(limits),
        }


def build_app(service: Service, about: About, token: str | None = None) -> FastAPI:
    """Return the application of one replica.

    Args:
        token: the bearer token that /predict, /model and /metrics require; None requires none.
    """
    app = FastAPI(
        title="Meshuffle",
        version=__version__,
        description=f"{about.card.model}: {about.card.task}",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_state(app, service)
    _add_pages(app)
    _add_predict(app, service, about, [Depends(_Guard(token))] if token else [])
    app.add_middleware(_Counted, service=service)
    return app


def _add_predict(app: FastAPI, service: Service, about: About, guarded: list[Any]) -> None:
    card = about.card
    head = {"model": card.model, "task": card.task}
    description = about.to_dict(asdict(service.limits))
    kept_out = [401] if guarded else []

    @app.post(
        "/predict",
        summary="Predict one image or several",
        dependencies=guarded,
        response_class=Response,
        responses={
            200: {"model": answer_of(card.task), "description": "The predictions."},
            **_refusals(400, *kept_out, 413, 415, 422, 429, 500, 503, 504),
        },
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(
        request: Request,
        mask: Annotated[bool, Query(description="Add the mask of a segmentation.")] = False,
    ) -> Response:
        """The body is one image file, or multipart/form-data with an image in each part."""
        started = time.perf_counter()
        with service.admitted():
            try:
                async with asyncio.timeout(service.limits.seconds):
                    uploads = await read_upload(request, service.limits)
                    predictions = await service.predict(uploads, mask=mask)
            except TimeoutError:
                message = f"the request took longer than {service.limits.seconds:g} s"
                raise Refused(504, message) from None
        ms = round(1000 * (time.perf_counter() - started), 3)
        return _json({**head, "predictions": predictions, "ms": ms})

    @app.get(
        "/model",
        summary="Describe the model",
        dependencies=guarded,
        response_class=Response,
        responses={
            200: {"model": ModelAnswer, "description": "The model and the limits."},
            **_refusals(*kept_out),
        },
    )
    async def model() -> Response:
        return _json(description)

    @app.get(
        "/metrics",
        summary="Return the metrics of all replicas for Prometheus",
        dependencies=guarded,
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **_refusals(*kept_out),
        },
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": counted.CONTENT_TYPE})


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get(
        "/health",
        summary="Check that the process lives",
        response_class=Response,
        responses={200: {"model": State, "description": "The process lives."}},
    )
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get(
        "/ready",
        summary="Check that the service takes requests",
        response_class=Response,
        responses={200: {"model": State, "description": "It takes requests."}, **_refusals(503)},
    )
    async def ready() -> Response:
        if service.state != "ready":
            raise Refused(503, f"the service is {service.state}", {"retry-after": "1"})
        return _json({"status": "ready"})


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def start() -> HTMLResponse:
        return start_page()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return api_page(app.openapi())


def _add_errors(app: FastAPI) -> None:
    """Give every error the same form, whoever raises it."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error.status, error.message, error.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        allowed = error.headers or {}
        message = {
            404: f"no such path; there are {', '.join(_PATHS)}",
            405: f"{request.method} is not allowed here, only {allowed.get('Allow', 'others')}",
        }.get(error.status_code, error.detail)
        return _error(error.status_code, message, allowed)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return _error(500, "the service failed; its log says why")


class _Guard:
    """Admits requests that carry the token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def __call__(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
    ) -> None:
        known = given.credentials.encode("utf-8", "surrogateescape") if given else b""
        if not hmac.compare_digest(known, self._token):
            what = "wrong" if given else "missing"
            headers = {"www-authenticate": "Bearer"}
            raise Refused(401, f"the bearer token is {what}", headers)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _REFUSALS[status]} for status in statuses}


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    line = " ".join(message.split())
    return _json({"error": {"status": status, "message": line}}, status, headers)


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return plain data as a response; names that are not UTF-8 are escaped."""
    return Response(json.dumps(value).encode(), status, dict(headers or {}), "application/json")


class _Counted:
    """Counts and times the answers of the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        path = scope["path"] if scope["path"] in _PATHS else "other"

        def note(status: int) -> None:
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_seconds.labels(path).observe(time.perf_counter() - started)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                note(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            note(500)  # an outer handler sends it
            raise
