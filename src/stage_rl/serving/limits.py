"""What a reward server takes on, and how it says no."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEGABYTE = 2**20

COPIES = 3
"""How often a body is in memory while it is read: as it came, as text, as PNG files."""

PIXEL_BYTES = 6
"""Of a decoded pixel: three of its own, and three in the call that it becomes part of."""

SOON_S = 1
"""When to ask a busy or stopping server again."""


class Refusal(Exception):
    """A request that is not answered, in words for its client."""

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        """One word for programs; docs/server.md lists them."""
        self.message = message
        self.retry_after_s = retry_after_s


def stopping() -> Refusal:
    """To those who come when the server is about to stop."""
    return Refusal(503, "stopping", "the server stops; ask again", retry_after_s=SOON_S)


@dataclass(frozen=True)
class Limits:
    """Sizes and times that a request must keep."""

    body_bytes: int = 64 * MEGABYTE
    images: int = 256
    image_pixels: int = 2048 * 2048
    request_pixels: int = 64 * MEGABYTE
    """Pixels of all images of a request, decoded."""
    held_bytes: int = 1024 * MEGABYTE
    """Memory of all requests that are being read or wait; above it the server is busy."""
    kept_bytes: int = 16 * MEGABYTE
    """Answers that are kept for requests that come again."""
    body_s: float = 60.0
    """Longest time a body may take to arrive."""
    answer_s: float = 60.0
    """How long a request is held open; it comes again and finds the work going on."""
    call_s: float = 600.0
    """A call of a reward that takes longer counts as stuck, in the health of the server."""

    def __post_init__(self) -> None:
        """A request that can never be held would come again for ever."""
        assert COPIES * self.body_bytes + PIXEL_BYTES * self.request_pixels <= self.held_bytes


def limits(*, body_mb: int, side: int) -> Limits:
    """The limits for bodies of so many megabytes and images of so many pixels a side."""
    body, pixels = body_mb * MEGABYTE, side * side
    most = max(Limits.request_pixels, pixels)
    held = max(Limits.held_bytes, COPIES * body + PIXEL_BYTES * most)
    return Limits(body_bytes=body, image_pixels=pixels, request_pixels=most, held_bytes=held)


class Held:
    """Bytes that requests take up, of a fixed store."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.now = 0

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Takes bytes until the end of the block; a Refusal where there are not as many left."""
        if self.now + count > self._most:
            raise Refusal(503, "busy", "too much is waiting; ask again", retry_after_s=SOON_S)
        self.now += count
        try:
            yield
        finally:
            self.now -= count


class Gate:
    """Lets requests in until the server is asked to stop."""

    def __init__(self) -> None:
        self.is_draining = False
        self.inside = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Counts a request in; a Refusal once the server is to stop."""
        if self.is_draining:
            raise stopping()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


# The figures of a reward server, in the text form that Prometheus reads.


PREFIX = "stage_reward_server"

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)

IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Meters:
    """Counts what one server does."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_requests",
            "Requests for scores; outcome: ok, or the code of the error.",
            ["reward", "outcome"],
            registry=self._registry,
        )
        self._request_s = self._histogram(
            "request_seconds", "From the head of a request to its answer.", SECONDS
        )
        self._call_images = self._histogram(
            "call_images",
            "Images of a call of the reward; their sum is the number of images scored.",
            IMAGES,
        )
        self._call_s = self._histogram("call_seconds", "Duration of a call of the reward.", SECONDS)

    def request(self, reward: str, outcome: str, seconds: float) -> None:
        """Counts a request; `reward` must be one of the server's, or ''."""
        self._requests.labels(reward, outcome).inc()
        self._request_s.labels(reward).observe(seconds)

    def call(self, reward: str, num_images: int, seconds: float) -> None:
        """Counts a call of a reward."""
        self._call_images.labels(reward).observe(num_images)
        self._call_s.labels(reward).observe(seconds)

    def show(self, name: str, what: str, now: Callable[[], float]) -> None:
        """Adds a figure that is looked up when it is asked for."""
        gauge = Gauge(f"{PREFIX}_{name}", what, registry=self._registry)
        gauge.set_function(now)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        """A figure of each reward."""
        return Histogram(
            f"{PREFIX}_{name}", what, ["reward"], buckets=buckets, registry=self._registry
        )
