"""What `calibrate` and `compare` read, as batches of token ids: files, data sets, texts, conversations, tensors, ..."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .attention import seen_tokens
from .hosts.files import checkpoint_of

# Tokens of a batch by the model's names; those that are cached first.
_TOKEN_FIELDS = ("decoder_input_ids", "input_ids", "inputs_embeds")
_TEXT_FIELDS = ("text", "content", "prompt")
_CHAT_FIELDS = ("messages", "conversations", "conversation")
# A text file is tokenized in pieces of at least so many characters: it may be large, and few tokens of it needed.
_PIECE = 2**16


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        inputs: by the model's argument names.
        mask: `[B, T]`, False for padding of what goes into the cache; None where nothing is padding.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None

    @property
    def _tokens(self) -> torch.Tensor:
        return next(self.inputs[name] for name in _TOKEN_FIELDS if name in self.inputs)

    @property
    def num_sequences(self) -> int:
        return self._tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return self._tokens.shape[:2].numel() if self.mask is None else int(self.mask.sum())


# A string that is longer is no file's name nor a data set's.
_LONGEST_NAME = 1024


def batches_of(
    data: Any, model: Any, tokenizer: Any, num_samples: int, max_length: int, batch_size: int
) -> Iterator[Batch]:
    """Batches for `model` from whatever `calibrate` takes; see there. Nothing is read before it is asked for.

    Raises ValueError or TypeError that say what is accepted.
    """
    if isinstance(data, (str, os.PathLike)):
        data = _read_source(data)
    elif isinstance(data, torch.Tensor):
        data = data[None] if data.ndim == 1 else data
    if isinstance(data, (Mapping, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data of type {type(data).__name__}; give a text or JSONL file, the name of a data set, a "
            "sequence of texts, conversations or token ids, or a DataLoader"
        )
    samples = iter(data)
    first = next(samples, None)
    if first is None:
        raise ValueError("the data is empty")
    samples = itertools.chain([first], samples)
    if isinstance(first, Mapping) and any(name in first for name in _TOKEN_FIELDS):
        if not _is_row_of_ids(first):
            yield from _given_batches(samples, num_samples)
            return
    elif isinstance(first, torch.Tensor) and first.ndim == 2 and not isinstance(data, torch.Tensor):
        yield from _given_batches(({"input_ids": sample} for sample in samples), num_samples)
        return
    if model.config.is_encoder_decoder:
        raise ValueError(
            "an encoder-decoder model needs inputs of its encoder and tokens of its decoder; give batches "
            "{'input_ids': ..., 'decoder_input_ids': ...}"
        )
    sequences = _Tokens(model, tokenizer, max_length).sequences(samples)
    limited = itertools.islice(sequences, num_samples)
    while group := list(itertools.islice(limited, batch_size)):
        yield _padded(group)


def tokenizer_beside(model: Any) -> Any:
    """The tokenizer that lies where `model` was loaded from. Raises ValueError if there is none."""
    path, revision = checkpoint_of(model)
    try:
        if path is None:
            raise ValueError("the model was not loaded")
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text needs a tokenizer, and none is found beside the model ({path!r}); give one as tokenizer=..."
        ) from error


def _is_row_of_ids(sample: Mapping[str, Any]) -> bool:
    """Whether this is one row of a tokenized data set rather than a batch."""
    ids = sample.get("input_ids")
    return (isinstance(ids, torch.Tensor) and ids.ndim == 1) or (
        isinstance(ids, Sequence) and (len(ids) == 0 or isinstance(ids[0], int))
    )


def _given_batches(samples: Iterable[Any], num_samples: int) -> Iterator[Batch]:
    """Batches as somebody else made them, up to the first that reaches `num_samples` sequences."""
    num_seen = 0
    for sample in samples:
        inputs = {name: value for name, value in sample.items() if isinstance(value, torch.Tensor)}
        if not any(name in inputs for name in _TOKEN_FIELDS):
            kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in sample.items())
            raise ValueError(
                f"a batch of {kinds} has no tensor of tokens; give tensors {{'input_ids': [B, T], ...}}, or one row a "
                "sample, {'input_ids': [T]}"
            )
        # Cached are the decoder's tokens where there is a decoder, whatever padding the encoder's input has.
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
        batch = Batch({name: value for name, value in inputs.items() if name != "labels"}, None)
        batch = replace(batch, mask=None if mask is None else _tokens_by(mask, batch.num_sequences))
        yield batch
        num_seen += batch.num_sequences
        if num_seen >= num_samples:
            return


def _tokens_by(mask: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """`[B, T]`, False for padding."""
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"an attention mask of shape {list(mask.shape)} does not tell padding from tokens; give [B, T], or "
            "[B, 1, T, T]"
        )
    return mask.bool() if mask.ndim == 2 else seen_tokens(mask).expand(num_sequences, -1)


def _padded(sequences: Sequence[torch.Tensor]) -> Batch:
    """Sequences of tokens as one batch, padded at the end."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.int64, device="cpu")
    mask = torch.zeros(len(sequences), length, dtype=torch.bool, device="cpu")
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return Batch({"input_ids": ids, "attention_mask": mask.long()}, mask)


class _Tokens:
    """Samples of any kind to sequences of token ids; a long one gives several."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self._model = model
        self._given_tokenizer = tokenizer
        self._max_length = max_length

    @property
    def _tokenizer(self) -> Any:
        if self._given_tokenizer is None:
            self._given_tokenizer = tokenizer_beside(self._model)
        return self._given_tokenizer

    def sequences(self, samples: Iterable[Any]) -> Iterator[torch.Tensor]:
        for number, sample in enumerate(samples, start=1):
            ids = self._ids(sample)
            self._check(ids, number)
            start_id = getattr(self._given_tokenizer, "bos_token_id", None)
            starts_with_bos = len(ids) > 0 and start_id is not None and int(ids[0]) == start_id
            for start in range(0, len(ids), self._max_length):
                piece = ids[start : start + self._max_length]
                if start and starts_with_bos:  # every text that a model gets begins with it
                    piece = torch.cat([ids[:1], piece[: self._max_length - 1]])
                yield piece

    def _check(self, ids: torch.Tensor, number: int) -> None:
        """Raise ValueError for ids that the model has no embedding of: on a GPU these would end the process."""
        embedding = self._model.get_input_embeddings()
        if type(embedding) is not torch.nn.Embedding or not len(ids):
            return
        size = embedding.num_embeddings
        if strange := [index for index in (int(ids.min()), int(ids.max())) if not 0 <= index < size]:
            raise ValueError(
                f"sample {number} of the data has the token id {strange[0]}, but the model's vocabulary has {size:,} "
                f"tokens, 0 to {size - 1}; take a tokenizer, or ids, of this model"
            )

    def _ids(self, sample: Any) -> torch.Tensor:
        """Token ids `[T]` of a text, a conversation, a row of a data set, or of ids."""
        if isinstance(sample, Mapping):
            sample = _content(sample)
        if isinstance(sample, str):
            return self._encode(sample, special=True)
        if _is_conversation(sample):
            # As text first: what the template says about special tokens holds, and nothing is added to it.
            try:
                text = self._tokenizer.apply_chat_template(_with_usual_names(sample), tokenize=False)
            except ValueError as error:
                raise ValueError(f"conversations need a tokenizer with a chat template: {error}") from error
            return self._encode(text, special=False)
        try:
            ids = sample if isinstance(sample, torch.Tensor) else torch.as_tensor(sample, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0, 0, device="cpu")
        if ids.ndim != 1 or (len(ids) and ids.is_floating_point()):  # of an empty list torch makes floats
            raise TypeError(
                f"a sample of type {type(sample).__name__} is neither text, nor a conversation "
                "([{'role': ..., 'content': ...}, ...]), nor token ids [T]"
            )
        return ids.long()

    def _encode(self, text: str, special: bool) -> torch.Tensor:
        ids = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _content(row: Mapping[str, Any]) -> Any:
    if _is_row_of_ids(row):
        return row["input_ids"]
    for name in (*_CHAT_FIELDS, *_TEXT_FIELDS):
        if row.get(name):
            return row[name]
    raise ValueError(
        f"a sample with the fields {', '.join(map(str, row))} has no text; it needs one of "
        f"{', '.join((*_TEXT_FIELDS, *_CHAT_FIELDS))}, or input_ids"
    )


def _is_conversation(sample: Any) -> bool:
    return isinstance(sample, Sequence) and len(sample) > 0 and isinstance(sample[0], Mapping)


def _with_usual_names(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Turns as chat templates know them; some data sets say `from` and `value`."""
    roles = {"human": "user", "gpt": "assistant"}
    usual: list[Mapping[str, Any]] = []
    for turn in turns:
        if "role" not in turn and not ("from" in turn and "value" in turn):
            raise ValueError(
                f"a turn of a conversation has the fields {', '.join(map(str, turn))}; it needs role and content, or "
                "from and value"
            )
        usual.append(
            turn if "role" in turn else {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
        )
    return usual


def _read_source(source: str | os.PathLike[str]) -> Iterator[Any]:
    if "\n" in str(source) or len(str(source)) > _LONGEST_NAME:
        raise ValueError(
            f"data is a text itself ({len(str(source)):,} characters), not the name of a file or data set; "
            "give texts as a list, [text]"
        )
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.exists() or path.suffix in (".txt", ".json", ".jsonl", ".md"):
        raise ValueError(f"{path} is not a file; data is a text, JSON or JSONL file, or a data set's name")
    return _read_data_set(str(source))


def _read_file(path: Path) -> Iterator[Any]:
    if path.suffix == ".json":
        content = _parse(path.read_text(encoding="utf-8"), f"{path}")
        yield from content if isinstance(content, list) else [content]
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    else:
        with path.open(encoding="utf-8", errors="replace") as lines:
            piece: list[str] = []
            length = 0
            for line in lines:
                piece.append(line)
                length += len(line)
                if length >= _PIECE:
                    yield "".join(piece)
                    piece, length = [], 0
            if piece:
                yield "".join(piece)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _read_data_set(name: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name!r} is not a file, and reading it as a data set needs the datasets package: pip install datasets"
        ) from error
    repository, *rest = name.split(":")
    *config, split = rest or ["train"]
    try:
        return iter(datasets.load_dataset(repository, *config, split=split, streaming=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is neither a file nor a data set that can be read: {error}") from error
