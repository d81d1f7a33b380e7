"""What else users do with `generate`: sampling, streams, constraints, their own loops, images, adapters, small weights.

With unquantized pages the tokens are `DynamicCache`'s; with 8-bit pages they are those of a dense cache whose numbers
went through the same rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from helpers import QMAX, need_fake_quantization, prompt, tiny_llama
from test_cache import sliding_model
from test_compile import compile_config
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    WhisperForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from hf_kvquant import LayerScales, PrefixCache, QuantizedPagedCache, read_scales
from hf_kvquant.hosts.conventions import CACHE_NAME, with_cache

NUM_NEW = 16
SCALE = 2.0**-5  # a power of two, so that dividing by it rounds nothing


class RoundedCache(DynamicCache):
    """Dense, but numbers went through a format with the scale `SCALE`; a fresh prompt sees its own as they came."""

    def __init__(self, config: Any, name: str) -> None:
        super().__init__(config=config)
        self.format = name

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        is_fresh = self.get_seq_length(layer_idx) == 0
        sides = [rounded(side, self.format) for side in (key_states, value_states)]
        stored = super().update(*sides, layer_idx, *args, **kwargs)
        return (key_states, value_states) if is_fresh else stored


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "model":
        return x
    codes = (x / SCALE).clamp(-QMAX[name], QMAX[name])
    codes = codes.round() if name == "int8" else codes.to(torch.float8_e4m3fn).to(x.dtype)
    return codes * SCALE


def caches(model: PreTrainedModel, name: str) -> Iterator[Any]:
    """The dense cache, then ours."""
    yield DynamicCache(config=model.config) if name == "model" else RoundedCache(model.config, name)
    scales = LayerScales(torch.tensor([SCALE]), torch.tensor([SCALE]))
    yield QuantizedPagedCache.from_model(model, kv_cache_dtype=name, scales=scales, page_size=4)


def padded_prompt() -> dict[str, torch.Tensor]:
    ids = prompt(3, 21)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, :1] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


FORMATS = pytest.mark.parametrize("name", ["model", "fp8_e4m3", "int8"])
MODELS = pytest.mark.parametrize("make_model", [tiny_llama, sliding_model], ids=["full", "sliding"])


class Collector(BaseStreamer):
    """Keeps what comes out of the stream, prompt first."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


@torch.no_grad()
def own_loop(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> Any:
    """A decoding method of a user's own: the second best token, always."""
    cache = kwargs[CACHE_NAME]
    for _ in range(generation_config.max_new_tokens):
        logits = model(input_ids[:, cache.get_seq_length() :], past_key_values=cache).logits
        input_ids = torch.cat([input_ids, logits[:, -1].topk(2).indices[:, 1:]], dim=1)
    return input_ids


def only_even(batch_id: int, tokens: torch.Tensor) -> list[int]:
    return list(range(4 + 2 * (len(tokens) % 2), 99, 4))


def halve_repeated(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.scatter(1, input_ids, scores.gather(1, input_ids) / 2)


WAYS: dict[str, dict[str, Any]] = {
    "temperature and top_p": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "top_k, several sequences": {"do_sample": True, "top_k": 7, "num_return_sequences": 3},
    "min_p": {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.3},
    "beam sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 6},
    "constrained": {"do_sample": False, "prefix_allowed_tokens_fn": only_even},
    "constrained beams": {"do_sample": False, "num_beams": 3, "prefix_allowed_tokens_fn": only_even},
    "processors": {"do_sample": False, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]], "min_new_tokens": 3},
    "own processor": {"do_sample": False, "logits_processor": LogitsProcessorList([halve_repeated])},
    "own criterion": {
        "do_sample": False,
        "stopping_criteria": StoppingCriteriaList([lambda ids, _: ids[:, -1] % 5 == 0]),
    },
}


@FORMATS
@MODELS
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_a_dense_cache(way: str, make_model: Any, name: str) -> None:
    model = make_model()
    results = []
    for cache in caches(model, name):
        torch.manual_seed(0)
        options = {"max_new_tokens": NUM_NEW, "past_key_values": cache, **WAYS[way]}
        results.append(model.generate(**padded_prompt(), **options))
    assert torch.equal(*results)
    assert results[0].shape[1] > 21


@FORMATS
def test_embeddings_instead_of_tokens(name: str) -> None:
    model = tiny_llama()
    inputs = padded_prompt()
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    greedy, sampled = [], []
    for cache in caches(model, name):
        new = model.generate(
            inputs_embeds=embeddings, **inputs, past_key_values=cache, max_new_tokens=NUM_NEW, do_sample=False
        )
        greedy.append(new)
        # A second turn over the same cache, as embeddings of all that was said.
        said = torch.cat([embeddings, model.get_input_embeddings()(torch.cat([new, prompt(3, 5)], dim=1))], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, said.shape[1] - 21), value=1)
        torch.manual_seed(0)
        sampled.append(
            model.generate(
                inputs_embeds=said, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=True
            )
        )
    assert torch.equal(*greedy)
    assert torch.equal(*sampled)


@FORMATS
def test_a_streamer_gets_the_tokens_as_they_come(name: str) -> None:
    model = tiny_llama()
    ids = prompt(1, 15)
    for cache in caches(model, name):
        streamer = Collector()
        output = model.generate(ids, past_key_values=cache, max_new_tokens=NUM_NEW, do_sample=False, streamer=streamer)
        assert streamer.ended
        assert torch.equal(torch.cat(streamer.pieces), output[0])


def test_generating_in_two_threads_at_once() -> None:
    """As servers with a streamer do it: every request has a cache of its own."""
    model = tiny_llama()
    prompts = [prompt(1, 15, seed=seed) for seed in (1, 2)]
    expected = [model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False) for ids in prompts]
    results: dict[int, torch.Tensor] = {}

    def serve(index: int) -> None:
        results[index] = model.generate(prompts[index], max_new_tokens=NUM_NEW, do_sample=False)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(2))


@FORMATS
@MODELS
def test_a_decoding_loop_of_the_users(make_model: Any, name: str) -> None:
    model = make_model()
    options = {"custom_generate": own_loop, "max_new_tokens": NUM_NEW}
    results = [model.generate(prompt(), past_key_values=cache, **options) for cache in caches(model, name)]
    assert torch.equal(*results)
    ours = {"cache_implementation": "kvquant", "cache_config": {"kv_cache_dtype": "model"}}
    made = model.generate(prompt(), **options, **ours)
    assert name != "model" or torch.equal(made, results[0])


def test_a_decoding_loop_from_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, **kwargs):\n"
        "    output = model.generate(return_dict_in_generate=True, **kwargs)\n"
        "    return output.sequences.flip(1), output.past_key_values\n"
    )
    model = tiny_llama()
    options = {"max_new_tokens": NUM_NEW, "do_sample": False}
    expected = model.generate(prompt(), **options, cache_implementation="dynamic")
    sequences, cache = model.generate(
        input_ids=prompt(), custom_generate=str(tmp_path), trust_remote_code=True, **options,
        cache_config={"kv_cache_dtype": "model"},
    )  # fmt: skip
    assert isinstance(cache, QuantizedPagedCache)
    assert torch.equal(sequences.flip(1), expected)


# -- images --------------------------------------------------------------------------------------------------------

IMAGE = 98
_VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
_VISION |= {"num_hidden_layers": 1, "initializer_range": 0.2}
_PIXELS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "llava": lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    "gemma3": lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    "qwen2_vl": lambda: {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)},
}
_IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text_config": {"layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _VISION,
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 4},
        "image_token_id": IMAGE,
        "video_token_id": 97,
        "vision_start_token_id": 96,
        "vision_end_token_id": 95,
    },
}


@FORMATS
@pytest.mark.parametrize("model_type", _IMAGE_MODELS)
def test_a_prompt_with_an_image_and_a_second_turn(model_type: str, name: str) -> None:
    model = families.build(model_type, _IMAGE_MODELS[model_type])
    model.set_attn_implementation("kvquant")
    ids = prompt(2, 15, vocab_size=90)
    ids[:, 5:9] = IMAGE
    images = _PIXELS[model_type]()
    kinds = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids"}
    if model_type in kinds:
        images[kinds[model_type]] = (ids == IMAGE).int()
    first, second = [], []
    for cache in caches(model, name):
        options = {"past_key_values": cache, "max_new_tokens": NUM_NEW, "do_sample": False, "suppress_tokens": [IMAGE]}
        first.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **options))
        text = torch.cat([first[-1], prompt(2, 5, vocab_size=90, seed=2)], dim=1)
        second.append(model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options))
    assert torch.equal(*first)
    assert torch.equal(*second)
    assert all(layer.dense == () for layer in cache.report().layers)


# -- adapters ------------------------------------------------------------------------------------------------------


def adapted(kind: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    configs = {
        "lora": {"target_modules": ["k_proj", "v_proj"], "init_lora_weights": False},
        "prefix": {"num_virtual_tokens": 5},
        "prompt": {"num_virtual_tokens": 5},
    }
    classes = {"lora": peft.LoraConfig, "prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    return peft.get_peft_model(tiny_llama(), classes[kind](task_type="CAUSAL_LM", **configs[kind])).eval()


def need_prefix_in_hosts_cache(model: Any) -> None:
    """Skip where peft (0.21.2) does not know how transformers (5.24) calls its caches: the host's has no prefix."""
    learned = model.get_prompt(batch_size=1).layers[0].keys
    made = model.generate(
        input_ids=prompt(1), max_new_tokens=2, cache_implementation="dynamic", return_dict_in_generate=True
    )
    if not torch.equal(made.past_key_values.layers[0].keys[:, :, :5], learned):
        pytest.skip("the installed peft does not know how the installed transformers calls its caches")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("attention", ["kvquant", "eager"])
def test_a_learned_prefix_reaches_the_pages(attention: str) -> None:
    """Also where it does not reach the host's own cache; expected is a loop by hand over the base model."""
    model = adapted("prefix")
    base, ids = model.get_base_model(), prompt(2)
    base.set_attn_implementation("sdpa")
    cache, tokens = model.get_prompt(batch_size=2), ids
    with torch.no_grad():
        for _ in range(NUM_NEW):
            new = tokens[:, cache.get_seq_length() - 5 :]
            logits = base(new, **with_cache(cache)).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    base.set_attn_implementation(attention)
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "cache_config": {"kv_cache_dtype": "model"}}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache_implementation="kvquant", **options)
    assert torch.equal(made, tokens)
    with model.disable_adapter():
        assert not torch.equal(base.generate(ids, attention_mask=torch.ones_like(ids), **options), tokens)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@FORMATS
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_adapters(kind: str, name: str) -> None:
    model = adapted(kind)
    if kind == "prefix":
        need_prefix_in_hosts_cache(model)
    options = {**padded_prompt(), "max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True}
    ours: Any
    dense, ours = caches(model, name)
    expected = model.generate(past_key_values=dense, **options)
    tokens = model.generate(past_key_values=ours, **options).sequences
    if kind == "prefix":
        # It puts a dynamic cache of its own in the place of the dense one, so that nothing is rounded there.
        prefix = expected.past_key_values.layers[0].keys[:, :, :5]
        assert torch.equal(next(iter(ours))[0][:, :, :5], rounded(prefix, name))
    assert torch.equal(tokens, expected.sequences) or (kind, name) in {("prefix", "fp8_e4m3"), ("prefix", "int8")}
    assert ours.get_seq_length() == expected.past_key_values.get_seq_length()
    # Nothing of it is left for those who go without the adapter.
    with model.disable_adapter():
        base = model.get_base_model()
        without = base.generate(cache_implementation="dynamic", **options).sequences
        made = base.generate(cache_config={"kv_cache_dtype": "model"}, **options)
    assert not torch.equal(without, expected.sequences)
    assert torch.equal(made.sequences, without)
    assert made.past_key_values.get_seq_length() == 21 + NUM_NEW - 1


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("attention", ["kvquant", "eager"])
def test_a_cache_made_for_prefix_tuning(attention: str) -> None:
    model = adapted("prefix")
    need_prefix_in_hosts_cache(model)
    model.get_base_model().set_attn_implementation(attention)
    options = {**padded_prompt(), "max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(cache_implementation="dynamic", **options)
    for _ in range(2):
        made = model.generate(cache_implementation="kvquant", cache_config={"kv_cache_dtype": "model"}, **options)
        assert isinstance(made.past_key_values, QuantizedPagedCache)
        assert torch.equal(made.sequences, expected.sequences)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_an_adapters_tokens_are_not_in_what_is_reserved(kind: str) -> None:
    """Where `generate` compiles, as on a GPU, pages grow if there are any."""
    model, ids = adapted(kind), prompt(2)
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "cache_config": {"kv_cache_dtype": "model"}}
    options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    made = model.generate(**options, compile_config=compile_config("eager"))
    assert made[CACHE_NAME].is_compileable == (kind == "lora")
    assert torch.equal(made.sequences, model.generate(**options).sequences)


WRAPPERS: dict[str, Callable[[], Any]] = {
    "compile": lambda: torch.compile(tiny_llama(), backend="eager"),
    "data parallel": lambda: torch.nn.DataParallel(tiny_llama()),
    "compiled adapters": lambda: torch.compile(adapted("lora"), backend="eager"),
}


@pytest.mark.parametrize("wrapped", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_models_in_wrappers(wrapped: Callable[[], Any], tmp_path: Path) -> None:
    model = wrapped()
    cache = QuantizedPagedCache.from_model(model, kv_cache_dtype="fp8")
    inner = cache.shared.model()
    assert isinstance(inner, PreTrainedModel)
    assert read_scales(model) is read_scales(inner) is None
    tokens = inner.generate(prompt(1), past_key_values=cache, max_new_tokens=4, do_sample=False)
    cache.save_pretrained(tmp_path)
    again = QuantizedPagedCache.from_pretrained(tmp_path, model)
    assert again.get_seq_length() == tokens.shape[1] - 1
    assert len(PrefixCache(model, max_bytes=2**20).cache_for(prompt(1)).layers) == 2


@pytest.mark.parametrize("what", ["a hub id", None, torch.nn.Linear(2, 2), tiny_llama().config])
def test_what_is_no_model(what: Any) -> None:
    for make in (QuantizedPagedCache.from_model, lambda model: PrefixCache(model, max_bytes=2**20)):
        with pytest.raises(
            TypeError, match=f"{type(what).__name__} is no transformers model; give what from_pretrained"
        ):
            make(what)


# -- small weights -------------------------------------------------------------------------------------------------


def compressed(tmp_path: Path, weights: dict[str, Any], activations: dict[str, Any] | None, kv: bool) -> Path:
    """A checkpoint as llm-compressor leaves it: scales of weights from their ranges, KV scales of 0.03 and 0.02."""
    ct = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    if kv:
        need_fake_quantization()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def args(options: dict[str, Any] | None) -> Any:
        return None if options is None else QuantizationArgs(**options)

    scheme = QuantizationScheme(targets=["Linear"], weights=args(weights), input_activations=args(activations))
    kv_scheme = args({"num_bits": 8, "type": "float", "strategy": "tensor"} if kv else None)
    model = tiny_llama("sdpa")
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], kv_cache_scheme=kv_scheme)
    ct.quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "k_scale"):
            module.k_scale.data.fill_(0.03)
            module.v_scale.data.fill_(0.02)
        if hasattr(module, "weight_scale"):
            size = scheme.weights.group_size
            weight = module.weight.detach()
            weight = weight[:, None] if size is None else weight.unflatten(1, (-1, size))
            scale, _ = calculate_qparams(weight.amin(-1), weight.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    return tmp_path


INT8 = {"num_bits": 8, "strategy": "channel"}
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
BY_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(("weights", "activations"), [(INT8, BY_TOKEN), (INT4, None)], ids=["w8a8", "w4a16"])
@pytest.mark.parametrize("kv", [False, True], ids=["", "kv_fp8"])
def test_compressed_weights(weights: Any, activations: Any, kv: bool, tmp_path: Path) -> None:
    """Weights and cache in few bits both at once, with the KV scales that come with the weights."""
    path = compressed(tmp_path, weights, activations, kv)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvquant")
    options = {**padded_prompt(), "max_new_tokens": NUM_NEW, "do_sample": False}
    made = model.generate(**options, return_dict_in_generate=True).past_key_values.report()
    own = ("fp8_e4m3", "checkpoint: model.layers.1.self_attn.k_scale") if kv else ("int8", "dynamic")
    assert made.layers[1].kv_cache_dtype[0] == own[0]
    assert made.layers[1].scales[0].startswith(own[1])
    assert made.layers[1].dense == ()
    if activations is not None:
        # Rounding activations makes one of the last bit of attention into one of a code: the same bits, then.
        model.set_attn_implementation("sdpa")
    for name in ("model", "fp8_e4m3", "int8"):
        both = list(caches(model, name))  # ours first switches off the rounding inside the model
        tokens = [model.generate(**options, past_key_values=cache) for cache in both]
        assert torch.equal(*tokens), name


def small_weights(library: str) -> Any:
    pytest.importorskip(library, reason=f"{library} is not installed")
    import transformers

    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if library == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.QuantoConfig(weights="int8")


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes", "optimum.quanto"])
def test_weights_quantized_while_loading(library: str, tmp_path: Path) -> None:
    config = small_weights(library)
    tiny_llama("sdpa", intermediate_size=128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="kvquant", quantization_config=config)
    for name in ("model", "fp8_e4m3", "int8"):
        tokens = [
            model.generate(**padded_prompt(), max_new_tokens=NUM_NEW, do_sample=False, past_key_values=cache)
            for cache in caches(model, name)
        ]
        assert torch.equal(*tokens), name


# -- encoders and decoders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_an_encoder_decoder_reports_both_attentions(options: dict[str, Any]) -> None:
    model = families.build("bart", attn_implementation="kvquant_fp8")
    output = model.generate(prompt(2, 17), max_new_tokens=NUM_NEW, return_dict_in_generate=True, **options)
    cache = output.past_key_values
    report = cache.report()
    assert [(row.layer_type, row.kv_cache_dtype[0]) for row in report.layers] == [
        *[("full_attention", "fp8_e4m3")] * 2,
        *[("cross_attention", "fp8_e4m3")] * 2,
    ]
    parts = (cache.self_attention_cache, cache.cross_attention_cache)
    assert report.nbytes == cache.nbytes == sum(part.nbytes for part in parts)
    assert cache.nbytes_allocated == sum(part.nbytes_allocated for part in parts)
    assert "cross_attention" in str(report)


def test_an_attention_that_transformers_switches_off_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Whisper does so for the times of words, and does not switch back."""
    config = families.config_of("whisper")
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation="kvquant").eval()
    settings = {"eos_token_id": None, "no_timestamps_token_id": 40, "is_multilingual": False}
    for name, value in {**settings, "alignment_heads": [[0, 0], [1, 1]]}.items():
        setattr(model.generation_config, name, value)
    sounds = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    with caplog.at_level("WARNING", logger="transformers"):
        model.generate(input_features=sounds, max_new_tokens=6)
        assert "not quantized any more" not in caplog.text
        model.generate(input_features=sounds, max_new_tokens=6, return_timestamps=True, return_token_timestamps=True)
    assert "The cache is not quantized any more: this model's attention was 'kvquant' and is 'eager'" in caplog.text
