"""A conversation that is put away and taken up again: the cache goes to disk in 8 bits.

    python examples/saved_session.py [MODEL] [--directory DIRECTORY]

MODEL is a hub id or a directory, by default the tiny model beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measuring import TINY_MODEL, encode, load
from safetensors.torch import load_file, save_file
from stdlib_text import held_out_text

from hf_kvquant import QuantizedPagedCache

TURN = "\n\ndef main():\n    "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--directory", type=Path, help="where the session is kept; by default it is not")
    parser.add_argument("--tokens", type=int, default=512, help="length of the first turn")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens generated a turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(args, args.directory or Path(temporary))


def run(args: argparse.Namespace, directory: Path) -> None:
    model, tokenizer = load(args.model)
    options = {"do_sample": False, "max_new_tokens": args.new_tokens}
    cache = QuantizedPagedCache.from_model(model)
    tokens = encode(tokenizer, held_out_text()[: 8 * args.tokens], model.device)[:, : args.tokens]
    tokens = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **options)

    # The cache is keys and values; the text belongs to you.
    cache.save_pretrained(directory)
    save_file({"input_ids": tokens.cpu()}, directory / "text.safetensors")
    size = sum(file.stat().st_size for file in directory.iterdir())
    dense = cache.report().model_dtype_bytes
    print(f"saved: {cache.get_seq_length()} tokens in {size:,} bytes; keys and values in {model.dtype}: {dense:,}")

    answers = []
    restored = QuantizedPagedCache.from_pretrained(directory, model)
    for name, going_on in (("uninterrupted", cache), ("restored", restored)):
        text = load_file(directory / "text.safetensors")["input_ids"].to(model.device)
        turn = tokenizer(TURN, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        text = torch.cat([text, turn], dim=1)
        computed = text.shape[1] - going_on.get_seq_length()
        answer = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=going_on, **options)
        answers.append(answer)
        print(f"== {name}: {computed} of {text.shape[1]} tokens to compute")
    print(TURN.lstrip("\n") + tokenizer.decode(answers[1][0, text.shape[1] :], skip_special_tokens=True))
    print(f"same tokens: {torch.equal(*answers)}")


if __name__ == "__main__":
    main()
