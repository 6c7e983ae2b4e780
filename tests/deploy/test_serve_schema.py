"""schemathesis asks what OpenAPI describes, well and badly; answers must be as described."""

from __future__ import annotations

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
