"""Makes the checkpoints beside this file with the tools that the field uses, and keeps what is about scales.

    pip install torch==2.13.0 llmcompressor==0.14.0.1      && python tests/checkpoints/make.py llm_compressor
    pip install torch==2.13.0 nvidia-modelopt==0.47.0 transformers accelerate datasets && python ... make.py modelopt
    pip install torch==2.13.0 amd-quark==0.13 transformers onnx requests               && python ... make.py quark
    pip install torch==2.13.0 auto-round==0.16.1 transformers compressed-tensors       && python ... make.py auto_round

The tests do not run it. Matrices are left out of the results; every scale, zero point and bias is as the tool wrote it.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8 = {**FP8, "type": "int"}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=99, max_position_embeddings=256, initializer_range=0.2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def tokens() -> torch.Tensor:
    return torch.randint(3, 99, (8, 32), generator=torch.Generator().manual_seed(1))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(index): index for index in range(99)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")


def keep(source: Path, name: str) -> None:
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    with safe_open(source / "model.safetensors", "pt") as file:
        parts = ("scale", "zero_point", "_bias", "model.norm.weight")
        tensors = {key: file.get_tensor(key) for key in file.keys() if any(part in key for part in parts)}  # noqa: SIM118
        save_file(tensors, target / "model.safetensors", metadata=file.metadata())
    for file in ("config.json", "hf_quant_config.json"):
        if (source / file).exists():
            shutil.copy(source / file, target)


def llm_compressor() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    data = Dataset.from_dict({"input_ids": tokens().tolist(), "attention_mask": [[1] * 32] * 8})

    def attention(**arguments: object) -> dict[str, object]:
        scheme = QuantizationScheme(targets=["LlamaAttention"], input_activations=QuantizationArgs(**arguments))
        return {"config_groups": {"attention": scheme}}

    recipes = {
        "fp8_tensor": {"kv_cache_scheme": FP8},
        "fp8_head": {"kv_cache_scheme": {**FP8, "strategy": "attn_head"}},
        "int8_tensor": {"kv_cache_scheme": INT8},
        "int8_head_asymmetric": {"kv_cache_scheme": {**INT8, "strategy": "attn_head", "symmetric": False}},
        "fp8_dynamic": {"kv_cache_scheme": {**FP8, "strategy": "token", "dynamic": True}},
        # These also have q_scale: memory that was never written.
        "fp8_attention": attention(**FP8),
        "fp8_attention_head": attention(**{**FP8, "strategy": "attn_head"}),
        "w8a8_fp8": {"targets": "Linear", "scheme": "FP8", "ignore": ["lm_head"], "kv_cache_scheme": FP8},
    }
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as directory:
            base, out = Path(directory) / "base", Path(directory) / "out"
            tiny_model().save_pretrained(base)
            tokenizer().save_pretrained(base)
            model = LlamaForCausalLM.from_pretrained(base)
            oneshot(
                model=model, processor=tokenizer(), dataset=data, recipe=QuantizationModifier(**recipe),
                num_calibration_samples=8, max_seq_length=32, pipeline="basic",
            )  # fmt: skip
            model.save_pretrained(out, save_compressed=True)
            keep(out, f"llm_compressor_{name}")


def modelopt() -> None:
    import modelopt.torch.quantization as quantization
    from modelopt.torch.export import export_hf_checkpoint

    caches = {"fp8": "FP8_KV_CFG", "fp8_affine": "FP8_AFFINE_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
    for name, cache in caches.items():
        recipe = quantization.utils.update_quant_cfg_with_kv_cache_quant(
            copy.deepcopy(quantization.FP8_DEFAULT_CFG), getattr(quantization, cache)["quant_cfg"]
        )
        model = quantization.quantize(tiny_model(), recipe, lambda model: model(tokens()))
        with tempfile.TemporaryDirectory() as out:
            export_hf_checkpoint(model, export_dir=out)
            keep(Path(out), f"modelopt_{name}")


def auto_round() -> None:
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    recipes = {"kv": {"static_kv_dtype": "fp8"}, "attention": {"static_attention_dtype": "fp8"}}
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as directory:
            base, out = Path(directory) / "base", Path(directory) / "out"
            tiny_model().save_pretrained(base)
            tokenizer().save_pretrained(base)
            rounding = AutoRound(
                LlamaForCausalLM.from_pretrained(base), tokenizer(), scheme="FP8_STATIC", iters=0, nsamples=8,
                seqlen=32, batch_size=2, dataset=DataLoader(tokens(), batch_size=2), disable_opt_rtn=True, **recipe,
            )  # fmt: skip
            rounding.quantize_and_save(str(out), format="llm_compressor")
            keep(next(out.glob("**/config.json")).parent, f"auto_round_fp8_{name}")


def quark() -> None:
    from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors
    from torch.utils.data import DataLoader

    for name, mode in (("native", "quark"), ("for_vllm", "fp8")):
        quantizer = ModelQuantizer(LLMTemplate.get("llama").get_config(scheme="fp8", kv_cache_scheme="fp8"))
        model = quantizer.freeze(quantizer.quantize_model(tiny_model(), DataLoader(tokens(), batch_size=2)))
        with tempfile.TemporaryDirectory() as out:
            export_safetensors(model, out, custom_mode=mode)
            keep(Path(out), f"quark_{name}")


if __name__ == "__main__":
    {"llm_compressor": llm_compressor, "modelopt": modelopt, "quark": quark, "auto_round": auto_round}[sys.argv[1]]()
