"""What takes minutes runs only where it is asked for."""

from __future__ import annotations

import os
from typing import Final

import pytest

SLOW: Final = "FEDBUS_TEST_DEPLOY"

asked_for = pytest.mark.skipif(os.environ.get(SLOW) != "1", reason=f"takes minutes: {SLOW}=1 runs it")
