"""A machine for gfx942: what Triton compiles for AMD's CDNA3, run on the CPU and checked as it runs.

As `ptx`, but wave by wave: from barrier to barrier one after the other, each by its own scalar registers. It also finds
registers that are used before a load into them has been waited for. It does not know which instructions need some
others between them.
"""
