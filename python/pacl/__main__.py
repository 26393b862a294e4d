"""`python -m pacl`, which torchrun starts: `torchrun --nproc-per-node 2 -m pacl train ...`."""

import sys

from .cli import main

sys.exit(main())
