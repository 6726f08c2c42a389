"""Folders of tiny random models, so that rewards load them as they load real ones."""

import functools

import pytest
import tiny_models


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of the model of a kind, as transformers saves it."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(kind):
        tiny_models.save(kind, root / kind)
        return str(root / kind)

    return folder
