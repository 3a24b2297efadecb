"""``python -m nbdfleece``: the same as the ``nbdfleece`` command."""

import sys

from nbdfleece.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
