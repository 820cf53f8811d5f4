"""Where the deployment files are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
