"""A reward that is computed by a server of rewards.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import random
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import as_completed, wait
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import torch
from pydantic import PositiveFloat, PositiveInt, PrivateAttr, ValidationError, model_validator
from torch import Tensor

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.base import RewardConfig, Score, missing_field
from stage_rl.rewards.protocol import (
    KEY_HEADER,
    PROTOCOL,
    REWARDS_PATH,
    SCORES_PATH,
    Offer,
    Offers,
    question_json,
    read_answer,
    read_token,
)
from stage_rl.rewards.threads import on_thread
from stage_rl.settings import TOKEN_ENV, did_you_mean, validation_error
from stage_rl.types import Prompt

log = logging.getLogger(__name__)


CONNECT_S = 10.0

FIRST_PAUSE_S = 0.2

LONGEST_PAUSE_S = 5.0

LONGEST_ADVICE_S = 30.0
"""Most that a server's Retry-After is obeyed."""

MAX_ANSWER_BYTES = 64 * 2**20

PASSING = {408, 429, 502, 503, 504}
"""Answers after which the same request may succeed: too slow, too busy, about to stop. So may one
that failed between here and the server."""

LOOPBACK = {"localhost", "127.0.0.1", "::1"}

JITTER = random.Random()
"""Of its own, so that a wait leaves the streams that anyone has seeded as they are."""


class RemoteRewardConfig(RewardConfig):
    """A reward of `stage rewards serve`, which tests its reference images itself."""

    changeable = (
        *("self_test", "url", "token_file", "token_env"),
        *("batch_size", "connections", "timeout_s", "give_up_s"),
        "device",
    )

    times_itself: ClassVar[bool] = True
    url: str
    """Address of the server, such as http://127.0.0.1:8000."""
    reward: str = ""
    """Name of the reward on the server; empty: its only one."""
    token_file: str | None = None
    """File with the server's token; null: token_env is read."""
    token_env: str = TOKEN_ENV
    """Environment variable with the token; a server on loopback may have none."""
    batch_size: PositiveInt = 32
    """Images of a request."""
    connections: PositiveInt = 8
    """Requests at a time."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for an answer; the request is then sent again."""
    give_up_s: PositiveFloat = 600.0
    """How long a request is sent again before the run stops."""
    _fields: list[str] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        try:
            parts = urlsplit(self.url)
            is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_right = False
        if not is_right or any(sign in self.url for sign in "@?# "):
            raise validation_error("url", f"'{self.url}' is not an address; write http://HOST:PORT")
        return self

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """What the server's reward requires; asks the server the first time."""
        if self._fields is None:
            client = self._client()
            self._fields = find_offer(client, self.reward)[0].required_fields
            client.close()
        return missing_field(prompt, self._fields)

    def build(self, device: torch.device) -> RemoteReward:
        """The reward; an InputError where the server has none of the name, or not the token."""
        client = self._client()
        offer, max_images = find_offer(client, self.reward)
        return RemoteReward(client, offer, min(self.batch_size, max_images), self.connections)

    def _client(self) -> RetryingClient:
        if importlib.util.find_spec("httpx2") is None:
            raise InputError(
                f"reward '{self.name}': httpx2 is not installed; run pip install 'stage-rl[server]'"
            )
        return RetryingClient(
            self.url,
            token=read_token(self.token_file, self.token_env),
            timeout_s=self.timeout_s,
            give_up_s=self.give_up_s,
            connections=self.connections,
        )


@dataclass(frozen=True)
class RemoteReward:
    """Scores images with a reward of a server, several requests at a time."""

    client: RetryingClient
    offer: Offer
    batch_size: int
    connections: int

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image.

        A RewardError where the server does not answer in time or refuses, a RuntimeError where
        its reward failed on some image.
        """
        batches = deque(_batches(prompts, self.batch_size, whole_groups=self.offer.whole_groups))
        stop, scores = threading.Event(), {}

        def work() -> None:
            while batches and not stop.is_set():
                try:
                    rows = batches.popleft()
                except IndexError:  # another took the last
                    return
                given = self._score(images_NHWC[rows], [prompts[row] for row in rows], stop)
                scores.update(zip(rows, given, strict=True))

        # They end with the call, and wait for the network and for zlib.
        workers = [on_thread(work, "rewards") for _ in range(min(self.connections, len(batches)))]
        try:
            for worker in as_completed(workers):
                worker.result()
        except Exception:
            # The others' scores are of no use any more.
            stop.set()
            wait(workers)
            raise
        return [scores[row] for row in range(len(prompts))]

    def close(self) -> None:
        self.client.close()

    def _score(
        self, images_NHWC: Tensor, prompts: Sequence[Prompt], stop: threading.Event
    ) -> list[Score]:
        name = self.offer.name
        try:
            body = question_json(images_NHWC, prompts)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward server: the metadata of a prompt is not JSON ({error}); "
                f"{prompts[0].place} or one after it"
            ) from error
        try:
            answer = self.client.ask("POST", SCORES_PATH.format(name=name), body, stop=stop)
        except ScoringFailed as error:
            # Not the user's mistake: the judge asks again by group, and drops those that fail.
            raise RuntimeError(f"reward '{name}' failed on its server: {error}") from error
        try:
            return read_answer(answer, num_images=len(prompts))
        except ValueError as error:
            raise RewardError(f"reward server: its answer holds {error}; update it") from error


def find_offer(client: RetryingClient, name: str) -> tuple[Offer, int]:
    """The server's reward of a name, or its only one for '', and the most images of a request.

    An InputError for an unknown name.
    """
    try:
        offers = Offers.model_validate_json(client.ask("GET", REWARDS_PATH))
    except ValidationError as error:
        raise RewardError(
            f"reward server: it does not speak protocol {PROTOCOL}; use one version on both sides"
        ) from error
    by_name = {offer.name: offer for offer in offers.rewards}
    if not name and len(by_name) == 1:
        return offers.rewards[0], offers.max_images
    if name not in by_name:
        hint = did_you_mean(name, by_name)
        raise InputError(f"reward: the server has no '{name}'; {hint}")
    return by_name[name], offers.max_images


def _batches(prompts: Sequence[Prompt], size: int, *, whole_groups: bool) -> list[list[int]]:
    """Places of the images of each request; the images of a prompt stay together if they must."""
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt.index if whole_groups else place, []).append(place)
    batches: list[list[int]] = []
    for group in groups.values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(group)
    return batches


class ScoringFailed(Exception):
    """The reward failed on the images of a request; others may well be scored."""


class RetryableError(Exception):
    """Why an attempt did not bring an answer; the server asks for a pause of `advice_s`."""

    def __init__(self, what: str, advice_s: float = 0.0) -> None:
        super().__init__(what)
        self.advice_s = advice_s


class AnswerTooLongError(Exception):
    """An answer of more bytes than any of ours has."""


class RetryingClient:
    """One server and what it wants to see; several threads may ask at once."""

    def __init__(
        self, url: str, *, token: str | None, timeout_s: float, give_up_s: float, connections: int
    ) -> None:
        import httpx2  # of an optional extra

        self._url = url.rstrip("/")
        self._give_up_s, self._timeout_s = give_up_s, timeout_s
        self._is_answered = True
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Exchanges run in a loop of their own: what a thread waits for cannot be ended in time, as
        # a server that sends a byte of its head now and then always keeps it waiting.
        self._loop = asyncio.new_event_loop()
        self._http = httpx2.AsyncClient(
            headers={**headers, "Content-Type": "application/json"},
            timeout=httpx2.Timeout(timeout_s, connect=CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=connections),
            # A proxy of the environment is for what lies outside this machine.
            trust_env=urlsplit(url).hostname not in LOOPBACK,
        )
        thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        thread.start()
        self._closed = threading.Event()
        self.close = weakref.finalize(self, _end, self._closed, self._loop, self._http, thread)

    def ask(
        self, method: str, path: str, body: bytes = b"", *, stop: threading.Event | None = None
    ) -> bytes:
        """The body of the answer, after as many attempts as fit in the time to give up.

        A RewardError where the server refuses or none answers, a `ScoringFailed` where the reward
        failed. All attempts have one key, by which the server knows them as one request. `stop`
        ends the waiting between them.
        """
        stop = stop or threading.Event()
        key, started, attempts = uuid.uuid4().hex, time.monotonic(), 0
        while True:
            try:
                answer = self._attempt(method, path, body, key)
                self._is_answered = True
                return answer
            except RetryableError as error:
                attempts += 1
                # A random part of a time that doubles, so that many clients do not come as one.
                longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempts - 1, 10))
                pause_s = error.advice_s + JITTER.uniform(0, longest_s)
                waited_s = time.monotonic() - started
                if waited_s + pause_s > self._give_up_s or stop.is_set():
                    raise RewardError(
                        f"reward server {self._url}: {error}, at attempt {attempts} after "
                        f"{waited_s:.0f} s; see that it runs, then start the same command again"
                    ) from error
                if self._is_answered:  # warns once until the next answer
                    again = f"asked again for up to {self._give_up_s:.0f} s"
                    log.warning("reward server %s: %s; %s", self._url, error, again)
                self._is_answered = False
            stop.wait(pause_s)

    def _attempt(self, method: str, path: str, body: bytes, key: str) -> bytes:
        import httpx2

        if self._closed.is_set():  # the process ends, and a thread of ours is still asking
            raise RewardError(f"reward server {self._url}: the client is closed")
        exchange = _exchange(self._http, method, self._url + path, body, key, self._timeout_s)
        try:
            response, content = asyncio.run_coroutine_threadsafe(exchange, self._loop).result()
        except AnswerTooLongError as error:
            raise RewardError(f"reward server {self._url}: its answer has no end") from error
        except TimeoutError as error:
            raise RetryableError(f"its answer took longer than {self._timeout_s:g} s") from error
        except httpx2.TransportError as error:
            what = f"{type(error).__name__} ({error})" if str(error) else repr(error)
            raise RetryableError(what) from error
        except httpx2.InvalidURL as error:
            raise InputError(f"url '{self._url}': {error}; write http://HOST:PORT") from error
        if response.status_code == 200:
            return content
        code, message = _error_of(response, content)
        is_foreign = response.status_code >= 500 and not code
        if response.status_code in PASSING or is_foreign:
            # A date as advice is as good as none.
            text = response.headers.get("Retry-After", "")
            is_count = text.isascii() and text.isdigit()
            advice_s = min(float(text), LONGEST_ADVICE_S) if is_count else 0.0
            raise RetryableError(f"{response.status_code} {message}", advice_s)
        if code == "reward_failed":
            raise ScoringFailed(message)
        what = f"reward server {self._url}: {response.status_code} {message}"
        raise InputError(what) if response.status_code == 401 else RewardError(what)


async def _exchange(
    http: Any, method: str, url: str, body: bytes, key: str, timeout_s: float
) -> tuple[Any, bytes]:
    """An answer and its body.

    A TimeoutError where the whole takes longer than `timeout_s`, whatever has come by then.
    """
    content = bytearray()
    async with (
        asyncio.timeout(timeout_s),
        http.stream(method, url, content=body, headers={KEY_HEADER: key}) as response,
    ):
        async for part in response.aiter_bytes():
            content += part
            if len(content) > MAX_ANSWER_BYTES:
                raise AnswerTooLongError
    return response, bytes(content)


def _end(
    closed: threading.Event, loop: asyncio.AbstractEventLoop, http: Any, thread: threading.Thread
) -> None:
    """Closes the connections and ends the thread of their loop."""
    closed.set()
    asyncio.run_coroutine_threadsafe(http.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _error_of(response: Any, content: bytes) -> tuple[str, str]:
    """Code and message of an error; what stands between us and the server may not write JSON."""
    try:
        error: Any = json.loads(content)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", response.reason_phrase
