"""The figures of a reward server, in the text form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
