"""What a recipe says of a reward that a server gives; free of torch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from pydantic import PrivateAttr, model_validator

from stage_rl.errors import InputError
from stage_rl.rewards.bearer import TOKEN_ENV, read_token
from stage_rl.schema import RewardConfig
from stage_rl.settings import Count, Positive, complaint
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.patient import PatientClient
    from stage_rl.rewards.remote import RemoteReward


class RemoteRewardConfig(RewardConfig):
    """A reward of `stage rewards serve`, which tests its reference images itself."""

    url: str
    """Address of the server, such as http://127.0.0.1:8000."""
    reward: str = ""
    """Name of the reward on the server; empty: its only one."""
    token_file: str | None = None
    """File with the server's token; null: token_env is read."""
    token_env: str = TOKEN_ENV
    """Environment variable with the token; a server on loopback may have none."""
    batch_size: Count = 32
    """Images of a request."""
    connections: Count = 8
    """Requests at a time."""
    timeout_s: Positive = 120.0
    """Longest wait for an answer; the request is then sent again."""
    give_up_s: Positive = 600.0
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
            raise complaint("url", f"'{self.url}' is no address; write http://HOST:PORT")
        return self

    def objection(self, prompt: Prompt) -> str | None:
        """What the server's reward requires; asks the server the first time."""
        if self._fields is None:
            from stage_rl.rewards.remote import find_offer

            client = self._client()
            self._fields = find_offer(client, self.reward)[0].required_fields
            client.close()
        missing = [field for field in self._fields if field not in prompt.metadata]
        return f"needs '{missing[0]}', which this prompt lacks" if missing else None

    def build(self, device: torch.device) -> RemoteReward:
        """The reward; an InputError where the server has none of the name, or not the token."""
        from stage_rl.rewards.remote import RemoteReward, find_offer

        client = self._client()
        offer, most = find_offer(client, self.reward)
        size = min(self.batch_size, most)
        return RemoteReward(client, offer, batch_size=size, connections=self.connections)

    def _client(self) -> PatientClient:
        if importlib.util.find_spec("httpx2") is None:
            raise InputError(
                f"reward '{self.name}': httpx2 is not installed; run pip install 'stage-rl[server]'"
            )
        from stage_rl.rewards.patient import PatientClient

        return PatientClient(
            self.url,
            token=read_token(self.token_file, self.token_env),
            timeout_s=self.timeout_s,
            give_up_s=self.give_up_s,
            connections=self.connections,
        )
