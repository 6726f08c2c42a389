"""The token of a reward server: where it comes from, and what will not do."""

import pytest

from stage_rl.errors import InputError
from stage_rl.rewards.protocol import TOKEN_ENV, read_token

TOKEN = "0123456789abcdef"


def test_a_file_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, "fedcba9876543210")
    assert read_token(None) == "fedcba9876543210"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(str(tmp_path / "token")) == TOKEN


def test_without_either_there_is_none(monkeypatch):
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_ENV, "")
    assert read_token(None) is None


@pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN + " 0", TOKEN + "é"])
def test_a_token_that_will_not_do_is_an_error_that_does_not_show_it(token, tmp_path):
    file = tmp_path / "token"
    file.write_text(token)
    with pytest.raises(InputError, match="shorter than 16 characters or holds others") as caught:
        read_token(str(file))
    assert not token or token not in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_token(str(tmp_path / "token"))
