"""Which format is good enough: the smallest cache that hardly changes what a model predicts on a text.

    python examples/choose_format.py [MODEL] [--data FILE]

MODEL is a hub id or a directory, by default the tiny model beside this file; FILE is text, JSON or JSONL.
"""

from __future__ import annotations

import argparse

from measuring import TINY_MODEL, load
from stdlib_text import held_out_text

from hf_kvquant import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_MODEL, help="hub id or directory")
    parser.add_argument("--data", help="text of the kind that the model will see")
    parser.add_argument("--most", type=float, default=1e-3, help="KL divergence that is allowed, in nats a token")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=2, help="how many")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    comparison = compare(
        model,
        args.data or [held_out_text()[:20_000]],
        tokenizer=tokenizer,
        formats=["fp8_e4m3", "int8", ("int8", "fp8_e4m3"), ("model", "int8")],
        context=args.context,
        num_windows=args.windows,
        new_tokens=min(32, args.context // 2),
        retrieval=[args.context],
    )
    print(comparison)
    measured = [(row.cache, row.quality) for row in comparison.rows if row.quality is not None]
    good = [(q.bytes_held, name) for name, q in measured if q.steps.kl_divergence <= args.most]
    print(f"\nsmallest with a KL divergence of at most {args.most:g}: {min(good)[1]}")


if __name__ == "__main__":
    main()
