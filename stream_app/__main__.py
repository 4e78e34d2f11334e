"""Entry point: `python -m stream_app`, and what the installed command `stream-app` calls."""

import sys

from stream_app.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
