"""The tiny model's tokenizer, which the tests of on-policy training share."""

import pytest

from alignment.models import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(str(tiny))
