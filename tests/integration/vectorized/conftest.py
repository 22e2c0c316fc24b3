"""What tests of vectorized clients share."""

from __future__ import annotations

import pytest

from tests.integration.vectorized.runs import Counter


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)
