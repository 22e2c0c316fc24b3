"""Tests; those of ``lightning_fed/<package>/`` are in ``<package>/``, whole fits in ``integration/``."""

import pytest

# Assertions in modules that tests share say what they compared, as in test files.
pytest.register_assert_rewrite("tests")
