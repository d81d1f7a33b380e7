"""Several turns over one cache: what earlier turns stored in 8 bits is not computed again.

    python examples/chat.py [MODEL]

MODEL is a hub id or a directory, by default the tiny model beside this file. That one has learned to continue text, so
a turn here is text that it goes on from.
"""

from __future__ import annotations

import argparse

import torch
from measuring import TINY_MODEL, encode, load

from hf_kvquant import QuantizedPagedCache

TURNS = (
    'def read_lines(path, encoding="utf-8"):\n    """',
    "\n\ndef write_lines(path, lines):\n    ",
    "\n\nclass Reader:\n    def __init__(self, path):\n        ",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens generated a turn")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    cache = QuantizedPagedCache.from_model(model)
    tokens = encode(tokenizer, "", model.device).long()  # the start token, if the tokenizer has one
    for number, turn in enumerate(TURNS, start=1):
        added = tokenizer(turn, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        # generate takes the whole conversation and computes only what the cache does not hold yet.
        tokens = torch.cat([tokens, added], dim=1)
        asked, to_compute = tokens.shape[1], tokens.shape[1] - cache.get_seq_length()
        tokens = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, do_sample=False,
            max_new_tokens=args.new_tokens,
        )  # fmt: skip
        print(f"== turn {number}: {to_compute} of {asked} tokens to compute")
        print(turn.lstrip("\n") + tokenizer.decode(tokens[0, asked:], skip_special_tokens=True))
        print(f"-- {cache.get_seq_length()} tokens stored, {cache.nbytes:,} bytes\n")
    print(cache.report())


if __name__ == "__main__":
    main()
