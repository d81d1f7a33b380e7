"""`python -m hf_kvquant`: the commands of `hf-kvquant`."""

import sys

from .cli import main

sys.exit(main())
