"""What tests of Lightning's features share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
