"""The secret by which a reward server knows its clients; it never stands in a recipe."""

from __future__ import annotations

import os
from pathlib import Path

from stage_rl.errors import InputError

TOKEN_ENV = "STAGE_REWARD_TOKEN"
"""Environment variable that holds the token where no other is named."""
LEAST_LENGTH = 16


def read_token(file: str | None, variable: str = TOKEN_ENV) -> str | None:
    """The token in a file, else in an environment variable; None where neither is given.

    An InputError for a file that cannot be read, and for a token that is too short or does not fit
    into a header. Errors do not show the token.
    """
    if file is None:
        where, token = f"${variable}", os.environ.get(variable, "").strip()
        if not token:
            return None
    else:
        where, token = f"token file {file}", _read(file)
    if len(token) < LEAST_LENGTH or not all("!" <= sign <= "~" for sign in token):
        raise InputError(
            f"{where}: the token is shorter than {LEAST_LENGTH} characters or holds others than "
            "printable ASCII; write one such as `openssl rand -hex 32` gives"
        )
    return token


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError(f"token file {file}: {error.strerror}; name a file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"token file {file}: is no text; name a file with the token") from error
