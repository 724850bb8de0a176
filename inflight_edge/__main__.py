"""``python -m inflight_edge`` is ``inflight-edge``."""

import sys

from inflight_edge.cli import main

sys.exit(main())
