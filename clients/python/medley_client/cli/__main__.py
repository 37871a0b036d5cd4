"""``python -m medley_client.cli``: the same as ``medley``."""

from __future__ import annotations

import sys

from medley_client.cli import main

sys.exit(main())
