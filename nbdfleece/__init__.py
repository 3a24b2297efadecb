"""nbdfleece: an NBD server for fleecing.

A guest goes on writing to its disk while backup clients read the disk as it was at one instant.
The rooms of the package, and which of them may import which, are described in ARCHITECTURE.md.
"""

from typing import Final

__version__: Final = "0.1.0"
