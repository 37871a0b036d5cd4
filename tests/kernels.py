"""Where tests keep native kernels: built once for all of them, servers included, as a server builds them once for all of its starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

_HELD = tempfile.TemporaryDirectory(prefix="medley-kernels-")
KERNELS = Path(_HELD.name)
