"""Continuous batching (`generate_batch`, `hf-kvquant serve`) over 8-bit pages.

transformers schedules requests and counts their blocks; this package gives it a cache whose blocks are 8-bit pages, and
attends over them request by request.
"""
