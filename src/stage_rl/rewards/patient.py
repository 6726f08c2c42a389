"""HTTP requests to a reward server that are sent again until it answers."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
import time
import uuid
import weakref
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.wire import KEY_HEADER

log = logging.getLogger(__name__)

CONNECT_S = 10.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
LONGEST_ADVICE_S = 30.0
"""Most that a server's Retry-After is obeyed."""
PASSING = {408, 429, 502, 503, 504}
"""Answers after which the same request may succeed: too slow, too busy, about to stop. So may one
that failed between here and the server."""
UNKNOWN = 401
LOOPBACK = {"localhost", "127.0.0.1", "::1"}

JITTER = random.Random()
"""Of its own, so that a wait leaves the streams that anyone has seeded as they are."""


class Unscored(Exception):
    """The reward failed on the images of a request; others may well be scored."""


@dataclass(frozen=True)
class Trouble:
    """Why an attempt did not bring an answer."""

    what: str
    advice_s: float = 0.0
    """Least time until the next attempt, as the server asks."""


class PatientClient:
    """One server and what it wants to see; several threads may ask at once."""

    def __init__(
        self, url: str, *, token: str | None, timeout_s: float, give_up_s: float, connections: int
    ) -> None:
        self._url = url.rstrip("/")
        self._give_up_s = give_up_s
        self._is_answered = True
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx2.Client(
            headers={**headers, "Content-Type": "application/json"},
            timeout=httpx2.Timeout(timeout_s, connect=CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=connections),
            # A proxy of the environment is for what lies outside this machine.
            trust_env=urlsplit(url).hostname not in LOOPBACK,
        )
        self.close = weakref.finalize(self, self._http.close)

    def ask(
        self, method: str, path: str, body: bytes = b"", *, stop: threading.Event | None = None
    ) -> bytes:
        """The body of the answer, after as many attempts as fit in the time to give up.

        A RewardError where the server refuses or none answers, an `Unscored` where the reward
        failed. All attempts have one key, by which the server knows them as one request. `stop`
        ends the waiting between them.
        """
        stop = stop or threading.Event()
        key = uuid.uuid4().hex
        started = time.monotonic()
        for attempt in itertools.count():
            answer = self._attempt(method, path, body, key)
            if isinstance(answer, bytes):
                self._is_answered = True
                return answer
            pause_s = answer.advice_s + _pause(attempt)
            waited_s = time.monotonic() - started
            if waited_s + pause_s > self._give_up_s or stop.is_set():
                raise RewardError(
                    f"reward server {self._url}: {answer.what}, at attempt {attempt + 1} after "
                    f"{waited_s:.0f} s; see that it runs, then start the same command again"
                )
            self._tell(answer)
            stop.wait(pause_s)
        raise AssertionError

    def _attempt(self, method: str, path: str, body: bytes, key: str) -> bytes | Trouble:
        try:
            response = self._http.request(
                method, self._url + path, content=body, headers={KEY_HEADER: key}
            )
        except httpx2.TransportError as error:
            return Trouble(f"{type(error).__name__} ({error})" if str(error) else repr(error))
        except httpx2.InvalidURL as error:
            raise InputError(f"url '{self._url}': {error}; write http://HOST:PORT") from error
        if response.status_code == 200:
            return response.content
        code, message = _complaint(response)
        is_foreign = response.status_code >= 500 and not code
        if response.status_code in PASSING or is_foreign:
            return Trouble(f"{response.status_code} {message}", _advice(response))
        if code == "reward_failed":
            raise Unscored(message)
        what = f"reward server {self._url}: {response.status_code} {message}"
        raise InputError(what) if response.status_code == UNKNOWN else RewardError(what)

    def _tell(self, trouble: Trouble) -> None:
        """Warns once until the next answer."""
        if self._is_answered:
            log.warning(
                "reward server %s: %s; asked again for up to %.0f s",
                self._url,
                trouble.what,
                self._give_up_s,
            )
        self._is_answered = False


def _pause(attempt: int) -> float:
    """A random part of a time that doubles, so that many clients do not come back as one."""
    return JITTER.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 10)))


def _advice(response: httpx2.Response) -> float:
    """Seconds of Retry-After; 0 without one, or where it is a date."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_ADVICE_S) if text.isascii() and text.isdigit() else 0.0


def _complaint(response: httpx2.Response) -> tuple[str, str]:
    """Code and message of an error; what stands between us and the server may not write JSON."""
    try:
        error: Any = json.loads(response.content)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "", response.reason_phrase
