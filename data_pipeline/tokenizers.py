"""Text to token ids and back: one wrapper around Hugging Face `tokenizers`, and the makers of new ones."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

MASK, PAD, END, UNKNOWN = "<|mask|>", "<|pad|>", "<|endoftext|>", "<|unk|>"
SPECIALS = (MASK, PAD, END)
SMALLEST_BPE = 256 + len(SPECIALS)
LEGAL_SPECS = (
    f"bytes, characters, bpe:N (N at least {SMALLEST_BPE}, as in bpe:4096), "
    "or the path of a tokenizer.json or of a folder that holds one"
)
# The words of Qwen2: a sign and letters, one digit, signs and line ends, line ends, runs of blanks less one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A Hugging Face tokenizer with the three special tokens that masked diffusion needs.

    Missing specials are added at the end of the vocabulary. Nothing is added to, cut from or padded around a
    text, and text that spells a special token is encoded as ordinary text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, saved_as: str | None = None) -> None:
        loaded = backend.to_str()
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
        backend.encode_special_tokens = True
        self._backend = backend
        unchanged = saved_as is not None and backend.to_str() == loaded
        self._json: str = saved_as if saved_as is not None and unchanged else backend.to_str(pretty=True)
        ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        self.mask_id, self.pad_id, self.end_id = (ids[special] for special in SPECIALS)

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        return _from_json, (self._json,)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; ValueError for a word without a token, where none is for unknown words."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exceptions
            raise self._unknown_word([text]) from error
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them; the library spreads the work over threads."""
        try:
            return [item.ids for item in self._backend.encode_batch(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exceptions
            raise self._unknown_word(texts) from error

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of token ids; ids without a token are left out, special tokens too unless keep_special."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=not keep_special)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token reads as, for displays; a piece of a character reads as U+FFFD."""
        return self.decode([token_id], keep_special=True)

    def _unknown_word(self, texts: Sequence[str]) -> ValueError:
        known = self._backend.get_vocab(with_added_tokens=False)
        unknown = [word for text in texts for word in text.split() if word not in known] or list(texts)
        first, last = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        return ValueError(f"no token reads as {unknown[0]!r}; legal words, with blanks between: {first} to {last}")

    def sha256(self) -> str:
        """Digest of tokenizer.json as saved, which stays what it was under other versions of the library."""
        return hashlib.sha256(self._json.encode("utf-8")).hexdigest()

    def save(self, folder: Path) -> None:
        """Write folder/tokenizer.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"tokenizer.json.tmp-{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(self._json)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / "tokenizer.json")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder; ValueError when there is none or it is damaged."""
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return _from_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no tokenizer at {path} ({error.strerror}); legal: {LEGAL_SPECS}") from error
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"{file} is not a tokenizer.json of Hugging Face tokenizers ({error}); legal: {LEGAL_SPECS}"
            ) from error


def make_tokenizer(spec: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that a spec names.

    spec: `bytes` (256 rows and the specials), `characters` (those of the texts; others read as <|unk|>),
    `bpe:N` (byte-level pairs learned from the texts, at most N rows with the specials, fewer when the texts
    have no more pairs that occur twice), or a path.
    texts: called when the spec learns from the corpus. The same texts give the same tokenizer.
    Raises ValueError for any other spec, naming the legal ones.
    """
    if spec == "bytes":
        return Tokenizer(_byte_level(models.BPE(vocab=_byte_vocabulary(), merges=[]), words=False))
    if spec == "characters":
        return Tokenizer(_character_level(texts()))
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isascii() and size.isdecimal() and int(size) >= SMALLEST_BPE:
        return Tokenizer(_trained_pairs(int(size), texts()))
    if kind == "bpe" or not Path(spec).exists():
        raise ValueError(f"unknown tokenizer {spec!r}; legal: {LEGAL_SPECS}")
    return Tokenizer.load(Path(spec))


def value_tokenizer(num_values: int) -> Tokenizer:
    """The tokenizer of data that is made of numbers: id n reads as the text "n", blanks between, specials after them.

    Text with any other word is refused by a ValueError, and so are fewer than one value.
    """
    if num_values < 1:
        raise ValueError(f"a tokenizer of {num_values} values has no tokens; give at least 1 value")
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={str(value): value for value in range(num_values)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), saved_as=text)


def _byte_vocabulary() -> dict[str, int]:
    return {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _byte_level(model: models.BPE, *, words: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(Regex(WORDS), behavior="isolated")] if words else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _character_level(texts: Iterator[str]) -> tokenizers.Tokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {symbol: index for index, symbol in enumerate([*sorted(characters), UNKNOWN])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _trained_pairs(size: int, texts: Iterator[str]) -> tokenizers.Tokenizer:
    backend = _byte_level(models.BPE(), words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend
