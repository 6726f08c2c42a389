"""Runs a reward server until it is asked to stop, and then until it has answered all it took."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import cast

import torch
import uvicorn

from stage_rl.errors import InputError, Stopped
from stage_rl.rewards.base import RewardConfig
from stage_rl.rewards.check import require_order
from stage_rl.rewards.judge import build_reward
from stage_rl.serving.app import Routes, build_app
from stage_rl.serving.connections import connection_class, limit_logs
from stage_rl.serving.limits import Limits, MemoryBudget, Metrics
from stage_rl.serving.service import Batcher, RewardService

KEEP_ALIVE_S = 75
"""How long an idle connection is kept: longer than by clients, who could write to a closed one."""

SWITCH_S = 0.0005
"""How long a thread that reads a request may keep the one that answers waiting, turn by turn: with
Python's own 5 ms many clients were a second of silence."""

LAST_WORDS_S = 5
"""How long answers that are being sent may take after everything is scored."""


@dataclass(frozen=True)
class Serving:
    """How a server is reached and how it collects images."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    batch_size: int = 32
    """Images of a call; a larger request is a call of its own."""
    delay_s: float = 0.01
    """How long an image waits for others."""
    drain_s: float = 120.0
    """Longest time between being asked to stop and stopping."""
    limits: Limits = field(default_factory=Limits)


def serve(configs: Sequence[RewardConfig], settings: Serving, device: torch.device) -> None:
    """Serves rewards until a signal. Raises `Stopped` once all requests that it took are answered.

    An InputError for an address that cannot be had, or that others reach without a token; a
    RewardError where a reward orders its reference images wrongly.
    """
    check_reach(settings)
    with bound_socket(settings) as listener:
        routes = build_routes(configs, settings, device)
        server = Server(routes, settings)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        with _address_errors(settings):
            listener.listen()
        token = "with a token" if settings.token else "without a token"
        print(f"serving {', '.join(routes.services)} on http://{shown}:{port} {token}", flush=True)
        sys.setswitchinterval(SWITCH_S)
        server.run(sockets=[listener])
    left = server.num_unanswered
    message = f"requests left unanswered: {left}" if left else "all requests are answered"
    raise Stopped(f"stopped; {message}", signal_number=server.stopped_by or signal.SIGTERM)


def check_reach(settings: Serving) -> None:
    """An InputError where others than this machine could ask without a token."""
    is_loopback = settings.host == "localhost"
    with contextlib.suppress(ValueError):  # a name of the network
        is_loopback |= ipaddress.ip_address(settings.host).is_loopback
    if settings.token is None and not is_loopback:
        raise InputError(
            f"--host {settings.host}: others reach it, which needs a token; write --token-file FILE"
        )


@contextlib.contextmanager
def bound_socket(settings: Serving) -> Iterator[socket.socket]:
    """The socket of an address, taken before minutes are spent on loading models."""
    with _address_errors(settings):
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Named in full: asyncio sends at once, without waiting for more, on TCP sockets alone.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _address_errors(settings):
            listener.bind(address)
        yield listener


@contextlib.contextmanager
def _address_errors(settings: Serving) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"--host {settings.host} --port {settings.port}"
        raise InputError(f"{where}: {error.strerror}; write another") from error


def build_routes(
    configs: Sequence[RewardConfig], settings: Serving, device: torch.device
) -> Routes:
    """Loads and tests the rewards, and puts them behind the paths of a server."""
    budget, metrics, services = MemoryBudget(settings.limits.held_bytes), Metrics(), []
    for config in configs:
        item = build_reward(config, device)
        if config.self_test:
            require_order(config, item)
        batcher = Batcher(
            config.name,
            item.reward,
            # Images of two requests may be of one prompt without being one group.
            batch_size=0 if config.whole_groups else settings.batch_size,
            delay_s=settings.delay_s,
            metrics=metrics,
        )
        services.append(RewardService(config, batcher, limits=settings.limits, budget=budget))
    return Routes(services, settings.limits, budget, metrics)


class Server(uvicorn.Server):
    """Refuses new requests once it is asked to stop, and stops when the others are answered."""

    def __init__(self, routes: Routes, settings: Serving) -> None:
        config = uvicorn.Config(
            build_app(routes, settings.token),
            http=cast(type[asyncio.Protocol], connection_class()),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        super().__init__(config)
        limit_logs()
        self._routes = routes
        self._drain_s = settings.drain_s
        self._drain_until = 0.0
        self.stopped_by: int | None = None
        self.num_unanswered = 0
        """Requests that were being worked on when the time to finish them was over."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the server run dry, the second stops it at once."""
        if self.stopped_by is not None:
            self.should_exit = self.force_exit = True
        self.stopped_by = sig
        self._drain_until = time.monotonic() + self._drain_s
        self._routes.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now."""
        is_over = await super().on_tick(counter)
        if not self._routes.is_stopping:
            return is_over
        return is_over or self._routes.is_idle or time.monotonic() > self._drain_until

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the connections once their answers are sent."""
        self.num_unanswered = self._routes.answers.num_open
        await super().shutdown(sockets)
