"""A reward that is computed by a server of rewards.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from pydantic import ValidationError

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.base import Score
from stage_rl.rewards.patient import PatientClient, Unscored
from stage_rl.rewards.wire import (
    PROTOCOL,
    REWARDS_PATH,
    SCORES_PATH,
    Offer,
    Offers,
    question_json,
    read_answer,
)
from stage_rl.settings import near_or_all
from stage_rl.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class RemoteReward:
    """Scores images with a reward of a server, several requests at a time."""

    def __init__(
        self, client: PatientClient, offer: Offer, *, batch_size: int, connections: int
    ) -> None:
        self._client = client
        self._offer = offer
        self._batch_size = batch_size
        self._connections = connections

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image.

        A RewardError where the server does not answer in time or refuses, a RuntimeError where
        its reward failed on some image.
        """
        batches = _batches(prompts, self._batch_size, whole_groups=self._offer.whole_groups)
        stop = threading.Event()
        # The threads end with the call; they wait for the network and for zlib.
        with ThreadPoolExecutor(min(self._connections, len(batches) or 1)) as executor:
            asked = [
                executor.submit(self._score, images_NHWC[rows], [prompts[r] for r in rows], stop)
                for rows in batches
            ]
            done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
            if failed:
                # The others' scores are of no use any more.
                stop.set()
                executor.shutdown(cancel_futures=True)
                failed[0].result()
        scores = {
            row: score
            for rows, future in zip(batches, asked, strict=True)
            for row, score in zip(rows, future.result(), strict=True)
        }
        return [scores[row] for row in range(len(prompts))]

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _score(
        self, images_NHWC: Tensor, prompts: Sequence[Prompt], stop: threading.Event
    ) -> list[Score]:
        name = self._offer.name
        try:
            body = question_json(images_NHWC, prompts)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward server: the metadata of a prompt is no JSON ({error}); "
                f"prompt {prompts[0].index} or one after it"
            ) from error
        try:
            answer = self._client.ask("POST", SCORES_PATH.format(name=name), body, stop=stop)
        except Unscored as error:
            # Not the user's mistake: the judge asks again by group, and drops those that fail.
            raise RuntimeError(f"reward '{name}' failed on its server: {error}") from error
        try:
            return read_answer(answer, num_images=len(prompts))
        except ValueError as error:
            raise RewardError(f"reward server: its answer holds {error}; update it") from error


def find_offer(client: PatientClient, name: str) -> tuple[Offer, int]:
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
        hint = near_or_all(name, by_name)
        raise InputError(f"reward: the server has no '{name}'; {hint}")
    return by_name[name], offers.max_images


def _batches(prompts: Sequence[Prompt], size: int, *, whole_groups: bool) -> list[list[int]]:
    """Places of the images of each request; the images of a prompt stay together if they must."""
    if not whole_groups:
        return [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt.index, []).append(place)
    batches: list[list[int]] = []
    for group in groups.values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches
