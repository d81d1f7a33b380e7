"""Errors of keys, values and attention by layer: against the same computed by hand, and every layer by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from helpers import need_fake_quantization, prompt, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_kvquant import OutOfPagesError, QuantizedPagedCache
from hf_kvquant.evaluation.errors import LayerErrors, layer_errors

TINY = Path(__file__).parents[1] / "examples" / "tiny-python-lm"
PIECES = [15, 1, 17, 30]
# One scale per token and head, whatever came before: what is stored does not depend on the pieces.
PLAIN = {"kv_cache_dtype": "int8", "scales": "dynamic", "equalize": False, "page_size": 4}


def errors(model: PreTrainedModel, **options: Any) -> LayerErrors:
    cache = QuantizedPagedCache.from_model(model, **options)
    return layer_errors(model, prompt(1, sum(PIECES))[0].split(PIECES), cache)


def relative(expected: torch.Tensor, got: torch.Tensor) -> float:
    return ((got - expected).square().sum() / expected.square().sum()).sqrt().item()


def by_hand(model: Any, layer: int, key_dtype: str, value_dtype: str) -> tuple[float, float, float]:
    """Of one layer, in float64 over what a cache of its own gives back."""
    ids = prompt(1, sum(PIECES))
    attention = model.model.layers[layer].self_attn
    x = model(ids, output_hidden_states=True).hidden_states[layer]
    cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    x = model.model.layers[layer].input_layernorm(x)
    q, k, v = (p(x).view(1, -1, n, 16).transpose(1, 2)
               for p, n in ((attention.q_proj, 4), (attention.k_proj, 2), (attention.v_proj, 2)))  # fmt: skip
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    cache = QuantizedPagedCache.from_model(model, **{**PLAIN, "kv_cache_dtype": (key_dtype, value_dtype)})
    cache.update(k, v, 0)
    stored_k, stored_v = next(iter(cache))[:2]
    outputs = []
    for key, value in ((k, v), (stored_k, stored_v)):
        key, value = (side.double().repeat_interleave(2, dim=1) for side in (key, value))
        logits = q.double() @ key.transpose(2, 3) * 16**-0.5
        hidden = torch.ones_like(logits[0, 0]).triu(1).bool()
        mixed = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value
        outputs.append((mixed.transpose(1, 2).flatten(2) @ attention.o_proj.weight.double().T)[:, PIECES[0] :])
    return relative(k, stored_k), relative(v, stored_v), relative(*outputs)


@pytest.mark.parametrize("attention", ["sdpa", "kvquant", "eager"])
@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("int8", "model"), ("model", "int8")])
def test_the_numbers(dtypes: tuple[str, str], attention: str) -> None:
    model = tiny_llama(attention).requires_grad_(False)
    found = errors(model, **{**PLAIN, "kv_cache_dtype": dtypes})
    for layer in (0, 1):
        k_error, v_error, attention_error = by_hand(model, layer, *dtypes)
        # Storing is exact to the bit; the model's own arithmetic is fp32, whose 2**-24 add up over some 100 operations,
        # and errors are above 1e-3.
        noise = 100 * 2**-24 / 1e-3
        assert found.key[layer] == pytest.approx(k_error, rel=noise)
        assert found.value[layer] == pytest.approx(v_error, rel=noise)
        assert found.attention[layer] == pytest.approx(attention_error, rel=noise)
        assert attention_error > 1e-3


@pytest.mark.parametrize(
    ("model_type", "storing"),
    [
        ("bloom", [0, 1]),  # an attention of its own
        ("gpt2", [0, 1]),
        ("deepseek_v3", [0, 1]),  # keys are made of what is stored
        ("gemma3n_text", [0, 1]),  # the last two layers read what these store
        ("falcon_h1", [0, 1]),  # each layer keeps a linear-attention state as well
        ("qwen3_next", [1]),  # the first keeps a linear-attention state only
    ],
)
def test_models_of_many_kinds(model_type: str, storing: list[int]) -> None:
    model = families.build(model_type)
    ids = prompt(1, 33, vocab_size=90)[0].split([8, 1, 24])
    found = layer_errors(model, ids, QuantizedPagedCache.from_model(model, kv_cache_dtype="int8"))
    for side in (found.key, found.value, found.attention):
        assert [index for index, error in enumerate(side) if error is not None] == storing
        assert all(1e-4 < side[index] < 0.05 for index in storing)


@pytest.mark.parametrize("model_type", families.available(["hrm_text"]))
def test_one_module_for_several_layers_is_measured_for_the_one_whose_number_it_has(model_type: str) -> None:
    model = families.build(model_type)
    ids = prompt(1, 33, vocab_size=90)[0].split([8, 1, 24])
    found = layer_errors(model, ids, QuantizedPagedCache.from_model(model, kv_cache_dtype="int8"))
    assert [index for index, error in enumerate(found.attention) if error is not None] == [0, 1]
    assert sum(error is not None for error in found.key) > 2


def test_every_layer_by_itself() -> None:
    """What the layer before did to its keys changes nothing."""
    model = tiny_llama("sdpa", num_hidden_layers=3)
    both, only_last = errors(model, **PLAIN), errors(model, **PLAIN, skip_layers=[0, 1])
    assert only_last.key[:2] == only_last.value[:2] == only_last.attention[:2] == [0.0, 0.0]
    assert only_last.attention[2] == both.attention[2]
    assert both.attention[2] not in (None, 0.0)


@pytest.mark.parametrize("dtype", ["fp8_e5m2", "int8"])
def test_a_cache_that_fails_leaves_the_model_as_it_was(dtype: str) -> None:
    model = tiny_llama("kvquant")
    with pytest.raises(OutOfPagesError):
        errors(model, kv_cache_dtype=dtype, page_size=4, num_pages=5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_where_compressed_tensors_hands_on_a_wrapper_of_the_cache() -> None:
    """The repository's model as a user with that package loads it."""
    need_fake_quantization()
    model = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="kvquant")
    assert any(module._forward_pre_hooks for module in model.modules())
    found = errors(model, **PLAIN)
    for error in (*found.key, *found.value, *found.attention):
        assert error is not None
        assert 1e-3 < error < 0.05


class RoundedLayer(QuantizedLayer):
    """A quantized layer of transformers that keeps quarters."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 4).round()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 4


def test_of_caches_of_transformers_too_the_newest_tokens_count_as_they_are_stored() -> None:
    """Their `update` gives new tokens back as they came, and quantizes them, or not, for the next one."""
    model = tiny_llama("sdpa")
    cache = Cache(layers=[RoundedLayer(residual_length=8) for _ in range(2)])
    dense, ids = DynamicCache(config=model.config), prompt(1, sum(PIECES))[0]
    found = layer_errors(model, ids.split(PIECES), cache)
    model(ids[None], past_key_values=dense)
    for layer, of_dense in enumerate(dense.layers):
        for put, error in ((of_dense.keys, found.key[layer]), (of_dense.values, found.value[layer])):
            assert error == pytest.approx(relative(put, (put * 4).round() / 4), rel=1e-4)


def test_caches_are_left_as_they_were() -> None:
    model = tiny_llama("kvquant")
    cache = DynamicCache(config=model.config)
    ids = prompt(1, 21)
    found = layer_errors(model, ids[0].split([20, 1]), cache)
    assert found.key == found.value == found.attention == [0.0, 0.0]
    assert cache.get_seq_length() == 21
    assert "update" not in vars(cache)
