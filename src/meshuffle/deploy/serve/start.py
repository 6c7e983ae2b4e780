"""`meshuffle serve` as a function: choose the fastest way by measurement, then serve."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import functools
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meshuffle.comm.device import check_device, num_cores
from meshuffle.comm.forking import fork_server
from meshuffle.comm.launch import require_memory
from meshuffle.deploy.serve import REPLICA, remember
from meshuffle.deploy.serve.backends import TORCH, Backend, candidates, prepare
from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.measure import (
    BATCHES,
    GPU_BATCHES,
    Choice,
    Layout,
    best_batch,
    best_layout,
    layouts,
    measured,
)
from meshuffle.deploy.serve.replica import Recipe
from meshuffle.deploy.serve.starting import refusing
from meshuffle.deploy.serve.supervisor import Supervisor
from meshuffle.errors import ConfigError, MeshuffleError, PlanError
from meshuffle.planner.plan import Plan
from meshuffle.planner.schedules import make_schedule
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import open_weights, require_repeated

TOKEN_VARIABLE = "MESHUFFLE_TOKEN"
_BACKLOG = 1024


@dataclass(frozen=True)
class Options:
    """The options of a service; None means that a measurement chooses.

    Attributes:
        port: TCP port; 0 takes a free one.
        replicas, threads: number of processes, and CPU threads of each.
        batch: the most images of a batch.
        window_ms: see `Batcher`.
        plan: how the ranks of a replica split the network, by tp and pp.
        token: bearer token that clients must send; None admits everybody.
        model: repeats the name of a `package.module:function` model.
        remeasure: measure again, even if an earlier start has measured the same.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "auto"
    replicas: int | None = None
    threads: int | None = None
    batch: int | None = None
    window_ms: float = 2.0
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    model: str | None = None
    remeasure: bool = False
    plan: Plan = Plan()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        for name in ("replicas", "threads", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if not 0 <= self.window_ms <= 1000:
            raise ConfigError(f"--window-ms {self.window_ms:g}: must be in 0 … 1000")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must be in 0 … 65535")


Say = Callable[[str], None]


def serve(
    target: Path, options: Options, *, say: Say, ready: Callable[[dict[str, Any]], None]
) -> None:
    """Serve the weights of `target` until SIGINT or SIGTERM.

    Args:
        target: a run folder or a weights file.
        say: called with lines about the progress.
        ready: called once with a description of the running service.

    Raises:
        ConfigError: an option or the address is wrong.
        RunError, ModelError: the weights cannot be used.
    """
    card = open_weights(target, options.model).card
    require_repeated(card.model, options.model)
    if card.task == "generate":
        raise ConfigError(f"{target}: a generate model makes images; it cannot predict one")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = _possible_backends(options, card, num_gpus)
    num_gpus = num_gpus if names == [TORCH] else 0  # exported files run on the CPU
    with (
        bound(options.host, options.port) as listener,
        tempfile.TemporaryDirectory(prefix="meshuffle-serve-") as scratch,
    ):
        fork_server(REPLICA)
        say(f"listening on {url_of(listener)}; requests get 503 until the service is ready")
        with refusing(listener, options.limits):
            choice = choose_once(names, target, card, options, Path(scratch), num_gpus, say)
        metrics = Path(scratch) / "metrics"
        metrics.mkdir()
        description = describe(listener, card, choice, options)
        supervisor = Supervisor(
            listener,
            _recipe(card, choice, options, str(metrics)),
            choice.layout.replicas,
            say=say,
            ready=lambda: ready(description),
        )
        asyncio.run(supervisor.run())


def _possible_backends(options: Options, card: Card, num_gpus: int) -> list[str]:
    """Return the backends to choose from.

    Raises:
        ConfigError: no backend is possible.
        PlanError: the plan cannot be served.
    """
    plan = options.plan
    if plan.dp > 1 or plan.dp_kind or plan.threads:
        raise PlanError(f"plan {plan}: give --replicas and --threads instead of dp and threads")
    if plan.num_ranks == 1:
        return candidates(options.backend, num_gpus)
    if options.backend not in ("auto", TORCH):
        raise ConfigError(f"--backend {options.backend} computes on one device; leave out --plan")
    make_task(card).check_plan(plan)
    make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
    require_memory(plan.num_ranks)
    check_device("auto", plan.num_ranks)
    return [TORCH]


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: this machine has no such address, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: no such address ({error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            what = f"--port {port}: in use on {host}; --port 0 finds a free one"
        else:
            what = f"--host {host} --port {port}: {error.strerror}"
        raise ConfigError(what) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_token(file: Path | None) -> str | None:
    """Return the token from a file, or else from the environment, or else None.

    Raises:
        ConfigError: the token is empty, cannot be read, or cannot be sent in a header.
    """
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        where = f"--token-file {file}"
        try:
            token = file.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not plain ASCII"
            raise ConfigError(f"{where}: {reason}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where}: a token is one word of printable ASCII")
    return token


def choose_once(
    names: list[str],
    target: Path,
    card: Card,
    options: Options,
    scratch: Path,
    num_gpus: int,
    say: Say,
) -> Choice:
    """Return what an earlier start chose here with the same options, or else `choose`."""
    arguments = (names, target, card, options, scratch, num_gpus, say)
    if len(names) == 1 and options.batch and (options.replicas or options.threads):
        return choose(*arguments)  # there is nothing to measure
    given = (options.backend, options.replicas, options.threads, options.batch)
    file = found = None
    try:
        file = remember.file_of(target, names, num_gpus, (*given, options.plan, options.model))
        if not options.remeasure:
            prepared = functools.partial(_prepared, target, options, scratch, say)
            found = remember.recall(file, names, prepared)
    except (OSError, MeshuffleError) as error:
        say(f"without the measurements of an earlier start: {error}")
    if found is not None:
        date, choice = found
        say(f"reusing the measurements of {date} in {file}; --remeasure measures again")
        return choice
    choice = choose(*arguments)
    if file is not None:
        try:
            remember.store(file, choice)
        except OSError as error:
            say(f"the next start will measure again: {error}")
    return choice


def _prepared(target: Path, options: Options, scratch: Path, say: Say, name: str) -> Backend:
    return prepare(name, target, options.model, scratch, say)


def choose(
    names: list[str],
    target: Path,
    card: Card,
    options: Options,
    scratch: Path,
    num_gpus: int,
    say: Say,
) -> Choice:
    """Return the fastest way to execute the network here; given options are not measured.

    Raises:
        MeshuffleError: no backend works; it is the error of the first one.
    """
    ranks = options.plan.num_ranks
    alone = dataclasses.replace(layouts(num_cores(), num_gpus, ranks)[0], replicas=1)
    batches = (options.batch,) if options.batch else GPU_BATCHES if num_gpus else BATCHES
    is_given = bool(options.batch and (options.replicas or options.threads))
    found: dict[str, tuple[Backend, dict[int, float]]] = {}
    reasons: list[MeshuffleError] = []
    for name in names:
        try:
            backend = prepare(name, target, options.model, scratch, say)
            backend = dataclasses.replace(backend, plan=str(options.plan))
            speeds = {batches[0]: 0.0}
            if len(names) > 1 or not is_given:
                say(f"measuring {name}")
                speeds = measured(backend, alone, batches, card.preprocess.size)
            found[name] = backend, speeds
        except MeshuffleError as error:
            say(f"without {name}: {error}")
            reasons.append(error)
    if not found:
        raise reasons[0]
    backend, speeds = max(found.values(), key=lambda one: max(one[1].values()))
    batch = best_batch(speeds)
    tried = _tried_layouts(backend, batch, card, options, num_gpus, say)
    speeds_by_name = {name: max(by_batch.values()) for name, (_, by_batch) in found.items()}
    return Choice(backend, best_layout(tried), batch, speeds_by_name, tried)


def _tried_layouts(
    backend: Backend, batch: int, card: Card, options: Options, num_gpus: int, say: Say
) -> list[Layout]:
    ranks = options.plan.num_ranks
    cores = max(1, num_cores() // ranks)
    if options.replicas or options.threads:
        replicas = options.replicas or max(1, cores // (options.threads or 1))
        return [Layout(replicas, options.threads or max(1, cores // replicas), ranks=ranks)]
    possible = layouts(num_cores(), num_gpus, ranks)
    if len(possible) == 1:
        return possible
    tried = []
    for one in possible:
        say(f"measuring {one}")
        speed = measured(backend, one, (batch,), card.preprocess.size)[batch]
        tried.append(dataclasses.replace(one, images_per_s=speed))
    return tried


def _recipe(card: Card, choice: Choice, options: Options, metrics: str) -> Recipe:
    layout, limits = choice.layout, options.limits
    return Recipe(
        backend=choice.backend,
        card=card.to_json(),
        runs_on=str(choice.backend),
        threads=layout.threads,
        readers=max(2, num_cores() // layout.replicas),
        max_batch=choice.batch,
        window_s=options.window_ms / 1000,
        limits=limits,
        max_requests=-(-limits.requests // layout.replicas),
        metrics=metrics,
        token=options.token,
    )


def describe(
    listener: socket.socket, card: Card, choice: Choice, options: Options
) -> dict[str, Any]:
    """Return the description of a service that is printed at its start, as plain data."""
    return {
        "url": url_of(listener),
        "model": card.model,
        "task": card.task,
        "classes": len(card.classes),
        "backend": str(choice.backend),
        "images_per_s": {name: round(speed, 1) for name, speed in choice.speeds.items()},
        "replicas": choice.layout.replicas,
        "ranks": choice.layout.ranks,
        "threads": choice.layout.threads,
        "layouts": {str(one): round(one.images_per_s, 1) for one in choice.layouts},
        "batch": choice.batch,
        "window_ms": options.window_ms,
        "limits": vars(options.limits),
        "token": options.token is not None,
    }
