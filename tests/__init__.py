"""Tests; those of ``lightning_fed/<package>/`` are in ``<package>/``, whole fits in ``integration/``."""

import sys

# Assertions in modules that tests share say what they compared, as in test files. Worker processes do without pytest,
# which takes each of them half a second to import.
if pytest := sys.modules.get("pytest"):
    pytest.register_assert_rewrite("tests")
