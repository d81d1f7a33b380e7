"""FP8 and INT8 paged KV cache for transformers.

    import hf_kvquant
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvquant")
    model.generate(**inputs)

Importing registers names with transformers, wraps the one method with which `generate` makes its cache, and teaches
continuous batching the names; models that use none of them run as before.
"""

from . import attention, generation
from ._version import __version__
from .cache import QuantizedPagedCache
from .calibration import Calibration, calibrate
from .checkpoint_scales import CheckpointScales
from .config import KVQuantConfig
from .evaluation import Benchmark, BenchRow, Comparison, ComparisonRow, bench, compare
from .exporting import WrittenScales, write_scales
from .pools import OutOfPagesError
from .prefix import PrefixCache
from .reading import read_scales
from .report import CacheReport, LayerReport
from .scales import LayerScales

__all__ = [
    "BenchRow",
    "Benchmark",
    "CacheReport",
    "Calibration",
    "CheckpointScales",
    "Comparison",
    "ComparisonRow",
    "KVQuantConfig",
    "LayerReport",
    "LayerScales",
    "OutOfPagesError",
    "PrefixCache",
    "QuantizedPagedCache",
    "WrittenScales",
    "__version__",
    "bench",
    "calibrate",
    "compare",
    "read_scales",
    "register",
    "write_scales",
]


def register() -> None:
    """Register the attention names and the cache implementation with transformers (done on import; idempotent)."""
    generation.register()  # first: it refuses versions of transformers that it does not know
    attention.register()


register()
