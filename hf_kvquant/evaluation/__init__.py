"""What a cache costs a model in quality, measured on the user's own text, and what it gives in speed and memory.

`comparison` has `compare`, `quality` its numbers; `benchmark` has `bench`, `speed` its numbers; `capacity` what fits.
`caches` has what stands side by side; `resume` keeps rows in a file, and with `attempt` one that fails does not end the
others.
"""

from .benchmark import bench
from .comparison import compare
from .rows import Comparison, ComparisonRow
from .speed import Benchmark, BenchRow

__all__ = ["BenchRow", "Benchmark", "Comparison", "ComparisonRow", "bench", "compare"]
