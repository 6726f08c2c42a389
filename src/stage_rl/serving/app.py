"""The paths of a reward server. Errors are JSON; none shows where in the code it arose."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stage_rl.rewards.protocol import KEY_HEADER, PROTOCOL, REWARDS_PATH, SCORES_PATH, Offers
from stage_rl.serving.limits import COPIES, Gate, Held, Limits, Meters, Refusal, stopping
from stage_rl.serving.service import RewardService
from stage_rl.settings import near_or_all

HEALTH_PATH = "/health"


class Front:
    """What the paths of one server share."""

    def __init__(
        self, services: Sequence[RewardService], limits: Limits, held: Held, meters: Meters
    ) -> None:
        self.services = {service.offer.name: service for service in services}
        self.gate = Gate()
        self.answers = Answers(limits)
        self._limits = limits
        self._held = held
        self._meters = meters
        waiting = "Images that wait for a call."
        meters.show("waiting_images", waiting, lambda: self._sum("num_waiting"))
        meters.show("open_requests", "Requests worked on.", lambda: self.answers.num_open)
        meters.show("held_bytes", "Memory of requests.", lambda: held.now)
        repeated = "Requests that came again and were not scored again."
        meters.show("repeated_requests", repeated, lambda: self.answers.num_repeated)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be answered."""
        return not self.gate.inside and not self.answers.num_open

    async def health(self, request: Request) -> Response:
        """Whether requests are taken; open to all, and says nothing else."""
        now, longest = time.monotonic(), self._limits.call_s
        began = [service.batcher.call_began for service in self.services.values()]
        status = "ready"
        if self.gate.is_draining:
            status = "stopping"
        elif any(start is not None and now - start > longest for start in began):
            status = "stuck"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """All figures for Prometheus."""
        return Response(self._meters.text(), media_type="text/plain; version=0.0.4")

    async def rewards(self, request: Request) -> Response:
        """What can be asked for."""
        offers = [service.offer for service in self.services.values()]
        known = Offers(protocol=PROTOCOL, max_images=self._limits.images, rewards=offers)
        return Response(known.model_dump_json(), media_type="application/json")

    async def scores(self, request: Request) -> Response:
        """The scores of the images in the body."""
        name = request.path_params["name"]
        with self._metered(name if name in self.services else ""), self.gate.entered():
            service = self.services.get(name)
            if service is None:
                what = f"no reward '{name}'; {near_or_all(name, self.services)}"
                raise Refusal(404, "reward", what)
            key, length = _key(request), _length(request, self._limits.body_bytes)
            with self._held.hold(COPIES * length):
                body = await _body(request, length, self._limits.body_s)
                named = None if key is None else f"{name}/{key}"
                try:
                    answer = await self.answers.get(named, body, service.answer)
                except asyncio.CancelledError as error:
                    # The time to finish is over; uvicorn's own answer would be a 500.
                    raise stopping() from error
        return Response(answer, media_type="application/json")

    @contextlib.contextmanager
    def _metered(self, reward: str) -> Iterator[None]:
        started, outcome = time.monotonic(), "internal"
        try:
            yield
            outcome = "ok"
        except Refusal as refusal:
            outcome = refusal.code
            raise
        finally:
            self._meters.request(reward, outcome, time.monotonic() - started)

    def _sum(self, name: str) -> float:
        return sum(getattr(service.batcher, name) for service in self.services.values())


class Guard:
    """Lets requests with the token through, and everyone to the health of the server."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 before a byte of the body is read."""
        is_request = scope["type"] == "http"
        if is_request and scope["path"] != HEALTH_PATH and not self._knows(scope):
            said = "wrong or missing token; send the header Authorization: Bearer TOKEN"
            response = _error(Refusal(401, "token", said))
            response.headers["WWW-Authenticate"] = "Bearer"
            return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return hmac.compare_digest(token, self._token) and scheme.lower() == b"bearer"


def build_app(front: Front, token: str | None) -> ASGIApp:
    """The server's paths; every one but its health needs the token where there is one."""

    @contextlib.asynccontextmanager
    async def calling(app: Starlette) -> AsyncIterator[None]:
        calls = [asyncio.create_task(one.batcher.run()) for one in front.services.values()]
        yield
        for call in calls:
            call.cancel()

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _error(error)

    async def explain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(Refusal(error.status_code, "path", f"{error.detail}; see docs/server.md"))

    async def give_up(request: Request, error: Exception) -> Response:
        return _error(Refusal(500, "internal", "the server failed; its log says how"))

    app = Starlette(
        routes=[
            Route(HEALTH_PATH, front.health),
            Route("/metrics", front.metrics),
            Route(REWARDS_PATH, front.rewards),
            Route(SCORES_PATH, front.scores, methods=["POST"]),
        ],
        exception_handlers={Refusal: refuse, HTTPException: explain, Exception: give_up},
        lifespan=calling,
    )
    return Guard(app, token)


def _error(refusal: Refusal) -> JSONResponse:
    retry = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else None
    error = {"code": refusal.code, "message": refusal.message}
    return JSONResponse({"error": error}, refusal.status, headers=retry)


def _key(request: Request) -> str | None:
    key = request.headers.get(KEY_HEADER)
    if key is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key):
        what = f"{KEY_HEADER}: write at most 64 letters, digits, '_' and '-'"
        raise Refusal(400, "key", what)
    return key


def _length(request: Request, most: int) -> int:
    """The length that a body is announced with. A form that a web page could send is refused."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "type", "send the header Content-Type: application/json")
    length = request.headers.get("Content-Length", "")
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise Refusal(411, "length", "send the header Content-Length")
    if int(length) > most:
        raise Refusal(413, "body", f"{length} bytes; send at most {most}, in fewer images")
    return int(length)


async def _body(request: Request, length: int, seconds: float) -> bytes:
    """The body; a Refusal where it does not arrive whole and in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
    except TimeoutError as error:
        raise Refusal(408, "slow_body", f"the body took longer than {seconds:g} s") from error
    except ClientDisconnect as error:
        raise Refusal(400, "gone", "the client went away") from error
    if len(body) != length:
        raise Refusal(400, "length", "the body is not as long as it was announced")
    return bytes(body)


# Remembers requests by their keys, so that one that comes again is not scored again.


Answering = Callable[[bytes], Coroutine[Any, Any, bytes]]

RECORD_BYTES = 512
"""What a kept answer takes beside its own bytes, roughly."""


@dataclass(frozen=True)
class Open:
    """A request that is worked on."""

    digest: bytes
    work: asyncio.Task[bytes]


@dataclass(frozen=True)
class Kept:
    """A request that was answered."""

    digest: bytes
    answer: bytes


class Answers:
    """The work that goes on, and the answers to the latest requests that had a key."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[str, Open] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._kept_bytes = 0
        self._going_on: set[asyncio.Task[bytes]] = set()
        self.num_repeated = 0
        """Requests that came again."""

    @property
    def num_open(self) -> int:
        """Requests that are being worked on, be their clients still there or not."""
        return len(self._going_on)

    async def get(self, key: str | None, body: bytes, answering: Answering) -> bytes:
        """The answer to a body: that of the earlier request with this key where there was one.

        The work does not end with the client that waits for it. A Refusal where the key belongs
        to another body, and where the work takes longer than a request is held open.
        """
        if key is None:
            return await self._wait(self._begin(answering(body)))
        digest = (await asyncio.to_thread(hashlib.sha256, body)).digest()
        known = self._open.get(key) or self._kept.get(key)
        if known is None:
            known = Open(digest, self._begin(answering(body)))
            self._open[key] = known
            known.work.add_done_callback(lambda work: self._close(key, digest, work))
        elif known.digest != digest:
            raise Refusal(409, "key", "this key was another request's; write a new one")
        else:
            self.num_repeated += 1
        return known.answer if isinstance(known, Kept) else await self._wait(known.work)

    async def _wait(self, work: asyncio.Task[bytes]) -> bytes:
        done, _ = await asyncio.wait([work], timeout=self._limits.answer_s)
        if not done:
            raise Refusal(504, "slow", "not scored yet; send the same request again with its key")
        return work.result()

    def _begin(self, answering: Coroutine[Any, Any, bytes]) -> asyncio.Task[bytes]:
        work = asyncio.create_task(answering)
        self._going_on.add(work)
        work.add_done_callback(self._end)
        return work

    def _end(self, work: asyncio.Task[bytes]) -> None:
        self._going_on.discard(work)
        if not work.cancelled():
            work.exception()  # a client that is gone does not ask for it

    def _close(self, key: str, digest: bytes, work: asyncio.Task[bytes]) -> None:
        """Keeps an answer in place of the oldest ones; a failure is forgotten."""
        del self._open[key]
        if work.cancelled() or work.exception() is not None:
            return
        self._kept[key] = Kept(digest, work.result())
        self._kept_bytes += RECORD_BYTES + len(work.result())
        while self._kept_bytes > self._limits.kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= RECORD_BYTES + len(oldest.answer)
