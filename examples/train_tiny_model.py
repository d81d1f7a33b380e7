"""Train a tiny model on the text every Python ships, and store FP8 KV-cache scales with it.

    python examples/train_tiny_model.py --output examples/tiny-python-lm --minutes 40
    python examples/train_tiny_model.py --model qwen3 --output examples/tiny-python-qk-norm
    python examples/train_tiny_model.py --model qwen2 --output examples/tiny-python-key-bias

The scales are stored the way llm-compressor stores them in a compressed-tensors checkpoint, so the result
stands in for a real calibrated model. Checkpoints are written while training; each is complete and usable.
"""

import argparse
import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stdlib_text import calibration_text, held_out_text, training_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END_OF_TEXT = "<|endoftext|>"
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
EVAL_WINDOW = 1024
# (share of the time after which it ends, window): short windows train faster, long ones come last.
WINDOW_SCHEDULE = ((0.45, 256), (0.7, 512), (1.0, 1024))
KV_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "quantization_status": "compressed",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    },
}
PROMPTS = ('def read_lines(path, encoding="utf-8"):\n    """', "The for statement is used to")


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose only special token starts every text, ends it and pads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    start = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[start]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> torch.Tensor:
    """Encode documents into one stream, each after a special token."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(documents))
    return torch.cat([torch.tensor(document.ids) for document in encoded])


def windows(stream: torch.Tensor, length: int, start_id: int) -> torch.Tensor:
    """Cut a stream into windows of `length` tokens that each begin with the special token."""
    rows = stream[1:].unfold(0, length - 1, length - 1)
    return torch.nn.functional.pad(rows, (1, 0), value=start_id)


def sample_batch(
    stream: torch.Tensor, num_tokens: int, length: int, start_id: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw windows at random places; each begins with the special token, as every prompt does."""
    offsets = torch.randint(len(stream) - length, (num_tokens // length, 1), generator=generator)
    batch = stream[offsets + torch.arange(length)]
    batch[:, 0] = start_id
    return batch


def llama(common: dict[str, Any]) -> PreTrainedModel:
    """Two query heads of 64 a key/value head."""
    sizes = {"hidden_size": 256, "intermediate_size": 576, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**common, **sizes, head_dim=64, rope_parameters=rope))


def qwen3(common: dict[str, Any]) -> PreTrainedModel:
    """Few wide heads, queries and keys normalized before they turn."""
    sizes = {"hidden_size": 192, "intermediate_size": 416, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3ForCausalLM(Qwen3Config(**common, **sizes, head_dim=128, rope_parameters=rope))


def qwen2(common: dict[str, Any]) -> PreTrainedModel:
    """Biases in the projections of queries, keys and values; some of the keys' are large from the start.

    Trained Qwen2.5 models have such biases in their first and last layer, the 7B a norm of 605 and of 921 over its 4
    heads, where 22 is usual. Training keeps what it begins with here: nothing decays a bias.
    """
    sizes = {"hidden_size": 192, "intermediate_size": 416, "num_attention_heads": 6, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = Qwen2ForCausalLM(Qwen2Config(**common, **sizes, head_dim=64, rope_parameters=rope))
    for layer in (model.model.layers[0], model.model.layers[-1]):
        bias = layer.self_attn.k_proj.bias.detach().view(2, 2, 32)  # head, half, rotary pair
        pairs = bias[:, :, [8, 16, 24]]  # one turns with every phrase, one once in a long text, one hardly
        bias[:, :, [8, 16, 24]] = torch.empty_like(pairs).uniform_(100, 200) * torch.randn_like(pairs).sign()
    return model


MODELS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {"llama": llama, "qwen3": qwen3, "qwen2": qwen2}


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build an untrained model."""
    model = MODELS[name]({
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    })  # fmt: skip
    # The padding token is set here only: in the model's config it would keep the special token untrained.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def build_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def rate_at(progress: float) -> float:
    """Share of the peak learning rate at a share of the training time: warm-up, then cosine to 2 %."""
    warm_up = 0.02
    if progress < warm_up:
        return max(progress, 0.0005) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def train(
    model: PreTrainedModel, stream: torch.Tensor, minutes: float, num_tokens: int, learning_rate: float, seed: int
) -> Iterator[tuple[int, float]]:
    """Train for a time on `num_tokens` a step, yielding the step and its loss after every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = build_optimizer(model, learning_rate)
    start_id = int(model.config.bos_token_id)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = next(length for end, length in WINDOW_SCHEDULE if progress < end)
        batch = sample_batch(stream, num_tokens, length, start_id, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_at(progress)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        yield step, loss.item()


@torch.no_grad()
def measure_kv_amax(model: PreTrainedModel, stream: torch.Tensor, count: int = 30) -> list[tuple[float, float]]:
    """Largest magnitude of the keys (after RoPE) and values that each layer hands to its cache."""
    batches = windows(stream, EVAL_WINDOW, int(model.config.bos_token_id))
    # Spread over the whole text, so that both prose and code are seen.
    batches = batches[torch.linspace(0, len(batches) - 1, min(count, len(batches))).long()]
    amax = torch.zeros(model.config.num_hidden_layers, 2)
    for row in batches:
        cache = DynamicCache(config=model.config)
        model(input_ids=row[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen = [[layer.keys.abs().max().float(), layer.values.abs().max().float()] for layer in cache.layers]
        amax = torch.maximum(amax, torch.tensor(seen))
    return [(float(key), float(value)) for key, value in amax]


def bfloat16_at_least(value: float) -> torch.Tensor:
    """The smallest bfloat16 that is not below a positive value, in shape [1]."""
    rounded = torch.tensor([value], dtype=torch.float64).to(torch.bfloat16)
    if rounded.item() < value:
        rounded = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return rounded


def write_kv_scales(directory: Path, scales: Sequence[tuple[float, float]]) -> None:
    """Store a key and a value scale per layer in a saved model, in the compressed-tensors form.

    The file with the weights and the configuration are each replaced in one step.
    """
    weights_path, config_path = directory / "model.safetensors", directory / "config.json"
    with safe_open(weights_path, framework="pt") as weights:
        metadata = weights.metadata()
        tensors = {name: weights.get_tensor(name).clone() for name in weights.keys()}  # noqa: SIM118
    for layer, (key_scale, value_scale) in enumerate(scales):
        prefix = f"model.layers.{layer}.self_attn."
        tensors[prefix + "k_scale"] = bfloat16_at_least(key_scale)
        tensors[prefix + "v_scale"] = bfloat16_at_least(value_scale)
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["quantization_config"] = KV_QUANTIZATION
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        new_weights, new_config = Path(scratch) / weights_path.name, Path(scratch) / config_path.name
        save_file(tensors, new_weights, metadata=metadata)
        new_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        new_weights.chmod(0o644)
        os.replace(new_weights, weights_path)
        os.replace(new_config, config_path)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, calibration: torch.Tensor, output: Path
) -> PreTrainedModel:
    """Save the model in bfloat16 with KV scales and the tokenizer; return it as loaded without the scales."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        # Loading keeps the rotary frequencies in float32, as every user of it has them. It comes first,
        # because with the scales there compressed-tensors rounds keys and values to FP8.
        narrow = type(model).from_pretrained(scratch, dtype=torch.bfloat16).eval()
        scales = [(key / FP8_MAX, value / FP8_MAX) for key, value in measure_kv_amax(narrow, calibration)]
        write_kv_scales(Path(scratch), scales)
        for path in Path(scratch).iterdir():
            os.replace(path, output / path.name)
    return narrow


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream: torch.Tensor, count: int | None = None) -> float:
    """Perplexity per token over windows of `EVAL_WINDOW` tokens, all of them or the first `count`."""
    batches = windows(stream, EVAL_WINDOW, int(model.config.bos_token_id))[:count]
    losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in batches]
    return math.exp(sum(losses) / len(losses))


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, greedy: bool) -> str:
    """Continue a prompt by 160 tokens."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    tokens = model.generate(**inputs, max_new_tokens=160, **options)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main() -> None:
    """Train, measure, save and show what the model writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama", help="what to train")
    parser.add_argument("--output", type=Path, required=True, help="directory to save to")
    parser.add_argument("--minutes", type=float, default=40, help="training time")
    parser.add_argument("--step-tokens", type=int, default=4096, help="tokens of a training step")
    parser.add_argument("--checkpoint-minutes", type=float, default=8, help="time between checkpoints")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    documents = training_text()
    tokenizer = train_tokenizer(documents, args.vocab_size)
    stream = encode(tokenizer, documents)
    held_out, calibration = encode(tokenizer, [held_out_text()]), encode(tokenizer, [calibration_text()])
    model = build_model(args.model, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, {len(held_out):,} held out")

    start = saved = time.monotonic()
    for step, loss in train(model, stream, args.minutes, args.step_tokens, args.learning_rate, args.seed):
        now = time.monotonic()
        if step % 50 == 0:
            print(f"{(now - start) / 60:5.1f} min  step {step}  loss {loss:.3f}", flush=True)
        if now - saved > 60 * args.checkpoint_minutes:
            checkpoint = save(model, tokenizer, calibration, args.output)
            print(f"checkpoint: held-out perplexity {perplexity(checkpoint, held_out, 16):.2f}", flush=True)
            saved = now

    final = save(model, tokenizer, calibration, args.output)
    tokens_per_byte = len(held_out) / len(held_out_text().encode())
    value = perplexity(final, held_out)
    bits_per_byte = math.log2(value) * tokens_per_byte
    print(f"step {step}: held-out perplexity {value:.3f}, {bits_per_byte:.3f} bits per byte")
    for prompt in PROMPTS:
        for greedy in (True, False):
            text = write_sample(final, tokenizer, prompt, greedy)
            print(f"--- {'greedy' if greedy else 'sampled'}\n{text}", flush=True)


if __name__ == "__main__":
    main()
