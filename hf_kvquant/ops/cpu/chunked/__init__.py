"""The operators in torch operators, for machines without a compiler: the reference's arithmetic, some pages at a time.

Starting an operator takes longer than most of a step's arithmetic, so what every step does takes few of them.
"""

from .attention import paged_attention
from .writing import newest_slots, write_kv

__all__ = ["newest_slots", "paged_attention", "write_kv"]
