"""The baselines' vocabulary: a BERT `vocab.txt`, or one made of the training text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from elmd.engine.files import write_text
from elmd.errors import CheckpointError

VOCABULARY = "vocab.txt"
PAD, UNK, CLS, SEP, MASK = CONTROL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Vocabulary:
    """BERT's WordPiece, lower-cased, a Chinese character a token, as GPT2-chitchat uses it.

    Made of the `tokenizers` library's parts without added tokens, so that a user's "[SEP]" stays text.

    Args:
        tokens: by id; as in a BERT `vocab.txt`.
        where: the file, for the message.

    Raises:
        CheckpointError: one of the five control tokens is not among them.
    """

    def __init__(self, tokens: Sequence[str], where: Path | None = None):
        self.tokens = list(tokens)
        ids: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            ids.setdefault(token, i)
        if lacking := [name for name in CONTROL if name not in ids]:
            raise CheckpointError(
                f"is no BERT vocabulary: it lacks {', '.join(lacking)}", where=where, fix="give one token a line"
            )
        self.pad, self.unknown, self.start, self.end, self.mask = (ids[name] for name in CONTROL)
        self._tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNK))
        self._tokenizer.normalizer, self._tokenizer.pre_tokenizer = _bert()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def never_written(self) -> list[int]:
        """Ids that no reply holds: what is unknown has no text (GPT2-chitchat forbids it too), the others no place."""
        return [self.pad, self.unknown, self.start, self.mask]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens; a space stands between Latin words and numbers only."""
        kept = [self.tokens[i] for i in ids if self.tokens[i] not in CONTROL]
        text = " ".join(kept).replace(" ##", "")
        return re.sub(r" (?![0-9a-z])|(?<![0-9a-z]) ", "", text)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        """The characters of the texts, the most frequent first; within a word (Latin, numbers) also as `##` pieces."""
        normalizer, splitter = _bert()
        first: Counter[str] = Counter()
        within: Counter[str] = Counter()
        for text in texts:
            for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
                first.update(word)
                if len(word) > 1:
                    within.update(f"##{character}" for character in word)

        def ranked(counts: Counter[str]) -> list[str]:
            return sorted(counts, key=lambda token: (-counts[token], token))

        return cls([*CONTROL, *ranked(first), *ranked(within)])

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """
        Raises:
            CheckpointError: the file cannot be read, or is no such vocabulary.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"cannot be read as a vocabulary ({error})", where=path, fix="give a BERT vocab.txt in UTF-8"
            ) from error
        return cls([line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)], path)

    def save(self, path: Path) -> None:
        write_text(path, "".join(f"{token}\n" for token in self.tokens))


def _bert() -> tuple[Any, Any]:
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
