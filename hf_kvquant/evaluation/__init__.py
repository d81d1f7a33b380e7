"""What a cache costs a model in quality, measured on the user's own text.

`comparison` has `compare`, `quality` its numbers, `caches` what stands side by side; `resume` keeps rows in a file,
and with `attempt` one that fails does not end the others.
"""

from .comparison import Comparison, ComparisonRow, compare

__all__ = ["Comparison", "ComparisonRow", "compare"]
