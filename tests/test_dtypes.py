"""Devices without float64, as MPS: what is measured and compared there is as on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_llama
from torch.utils._pytree import tree_map

from hf_kvquant.dtypes import has_dtype, to_float64
from hf_kvquant.evaluation.errors import _Squares
from hf_kvquant.identity import weights_facts


class Elsewhere(torch.Tensor):
    """A tensor on MPS, played on a CPU: it has no float64 before it comes back."""

    numbers: torch.Tensor
    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]
    data = property(lambda self: torch.empty(0))  # type: ignore[assignment] # to who asks for its type, a plain tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Any:
        if numbers.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device="meta")  # type: ignore
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_back = str(kwargs.pop("device", None)) == "cpu"
        args, kwargs = tree_map(lambda each: each.numbers if isinstance(each, Elsewhere) else each, (args, kwargs))
        result = func(*args, **kwargs)
        if is_back or not isinstance(result, torch.Tensor):
            return result
        return Elsewhere(result)


def test_float64_is_on_the_cpu_where_a_device_has_none() -> None:
    assert has_dtype(torch.device("cpu"), torch.float64)
    assert not has_dtype(torch.device("mps"), torch.float64)
    for x in (torch.randn(3, 5), torch.randn(7, dtype=torch.bfloat16), torch.arange(3)):
        assert torch.equal(to_float64(Elsewhere(x)), x.double())
        assert torch.equal(to_float64(x), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_known_again(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype, vocab_size=997)
    expected = weights_facts(model)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = Elsewhere(weight.detach())  # type: ignore[assignment]
    found = weights_facts(model)
    assert all(digest is not None for *_, digest in found["weights"].values())
    assert found == expected


def test_errors_are_summed() -> None:
    expected, got = torch.randn(2, 1000)
    here, there = _Squares(), _Squares()
    here.add(expected, got)
    there.add(Elsewhere(expected), Elsewhere(got))
    assert there.relative_error() == here.relative_error()
