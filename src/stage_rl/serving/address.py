"""Where a reward server is reached, and by whom; free of torch."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

from stage_rl.errors import InputError
from stage_rl.serving.limits import Limits


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


def check_reach(settings: Serving) -> None:
    """An InputError where others than this machine could ask without a token."""
    if settings.token is None and not _is_loopback(settings.host):
        raise InputError(
            f"--host {settings.host}: others reach it, which needs a token; write --token-file FILE"
        )


@contextlib.contextmanager
def listening(settings: Serving) -> Iterator[socket.socket]:
    """The socket of an address, taken before minutes are spent on loading models."""
    with named(settings):
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        door = socket.socket(family)
    with door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with named(settings):
            door.bind(address)
        yield door


@contextlib.contextmanager
def named(settings: Serving) -> Iterator[None]:
    """Turns what the system says of an address into an InputError."""
    try:
        yield
    except OSError as error:
        where = f"--host {settings.host} --port {settings.port}"
        raise InputError(f"{where}: {error.strerror}; write another") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
