"""Steps of decoding as CUDA graphs, for continuous batching with `use_cuda_graph=True`.

A graph is recorded for every number of requests (a power of two, the rest is padding) and every length of the page
table, before there are requests or when it is first met. All other steps run as they are, and so do all of a model
that cannot be recorded.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.utils import CudaGraphBuffer, stream_context
from transformers.utils import logging

from .tables import DecodeTables

logger = logging.get_logger(__name__)

_WARM_SIZES = 8  # so many numbers of requests are recorded before there are any


class GraphRunner(ModelRunner):  # type: ignore[misc]
    """transformers' own runner, over a `QuantizedBatchCache`."""

    _one_at_a_time = threading.Lock()  # of all recordings of a process

    def __init__(self, **kwargs: Any) -> None:
        # The cache lets go of tables; steps run one at a time, so that no graph is at work then.
        self._graphs: WeakKeyDictionary[DecodeTables, CudaGraphBuffer] = WeakKeyDictionary()
        super().__init__(**kwargs)
        self.pad_inputs = False

    def __del__(self) -> None:
        self._graphs.clear()  # before the memory that they share

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        """Sizes of the next step; only those of a graph are padded."""
        self.pad_inputs = use_decode_fast_path and self.use_cuda_graph_decode
        return super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)

    def compute_batch(self, model: torch.nn.Module, batch_data: dict[str, Any]) -> None:
        """Run a step: the graph of its size where all its requests decode."""
        inputs = self.inputs_and_outputs
        if (stream := inputs.compute_stream) is not None:
            stream.wait_stream(self._current_stream())  # inputs were brought there on that one
        if inputs.use_block_table and self.use_cuda_graph_decode:
            with stream_context(stream):
                tables = self.cache.begin_decoding(inputs.num_q_tokens)
            inputs.graphs = self._graphs.setdefault(tables, CudaGraphBuffer())
        super().compute_batch(model, batch_data)

    def _current_stream(self) -> Any:
        inputs = self.inputs_and_outputs
        if inputs.compute_stream is None:
            return None
        return torch.get_device_module(inputs.device).current_stream(inputs.device)

    def _capture_graph(self, forward_fn: Any, compute_stream: Any, *args: Any) -> None:
        """Run a step and record it; after one that cannot be recorded no other is."""
        is_computed = False

        def forward(*args: Any) -> None:
            nonlocal is_computed
            forward_fn(*args)
            is_computed = True

        try:
            # A recording that fails may not leave its own stream.
            with self._one_at_a_time, stream_context(self._current_stream()):
                super()._capture_graph(forward, compute_stream, *args)
        except RuntimeError as error:
            if not is_computed:
                raise
            self.use_cuda_graph_decode = False
            reason = error.__context__ or error  # ending a recording that has failed fails, too
            logger.warning_once(
                "A step of this model cannot be recorded as a CUDA graph, so all its steps run as they are: "
                f"{type(reason).__name__}: {reason}".partition("\n")[0]
            )

    @torch.no_grad()
    def warmup(self, model: torch.nn.Module) -> None:
        """Record steps of short requests, if all scales are known: made-up requests may have no say in them."""
        if not self.cache.max_decode_fast_path_length:
            return
        most = self.cb_config.max_requests_per_batch
        with self.cache.as_it_was():
            for num_requests in sorted({min(1 << exponent, most) for exponent in range(_WARM_SIZES)}):
                if self.use_cuda_graph_decode:
                    self.run_one_warmup(model, num_requests, None)
