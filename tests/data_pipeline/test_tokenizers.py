import json
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.tokenizers import Tokenizer, make_tokenizer, value_tokenizer

CORPUS = [Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py", "scanner.py")]


@cache
def made(spec: str) -> Tokenizer:
    return make_tokenizer(spec, lambda: iter(CORPUS))


any_text = st.text() | st.text(alphabet=" \n\r\t0a'_<|mask>") | st.sampled_from(CORPUS)


@pytest.mark.parametrize("spec", ["bytes", "bpe:512"])
@given(text=any_text)
def test_any_text_comes_back(spec: str, text: str) -> None:
    tokenizer = made(spec)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text


@given(text=st.text(alphabet=sorted(set("".join(CORPUS)))))
def test_known_characters_come_back_one_id_each(text: str) -> None:
    tokenizer = made("characters")
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_character_shows() -> None:
    tokenizer = made("characters")
    assert tokenizer.decode(tokenizer.encode("a\u00e9b")) == "a<|unk|>b"


@given(text=st.text())
def test_bytes_are_utf8(text: str) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [symbols[index] for index in made("bytes").encode(text)]
    reference = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert "".join(spelled) == "".join(piece for piece, _ in reference)
    assert len(spelled) == len(text.encode())


@pytest.mark.parametrize("spec", ["bytes", "characters", "bpe:512"])
def test_specials_are_the_last_rows_and_text_never_makes_one(spec: str) -> None:
    tokenizer = made(spec)
    specials = [tokenizer.mask_id, tokenizer.pad_id, tokenizer.end_id]
    assert specials == list(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    assert not set(specials) & set(tokenizer.encode("x = '<|mask|>' <|pad|><|endoftext|>"))
    ids = [*tokenizer.encode("a"), tokenizer.mask_id, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, keep_special=True) == "a<|mask|>b"
    assert tokenizer.token_text(tokenizer.end_id) == "<|endoftext|>"


def test_pairs_suit_python() -> None:
    tokenizer = made("bpe:512")
    assert tokenizer.vocab_size == 512
    pieces = [tokenizer.token_text(index) for index in tokenizer.encode("        return 123\n")]
    assert pieces[0] == " " * 7
    assert pieces[-4:] == ["1", "2", "3", "\n"]


def test_batches_equal_single_texts() -> None:
    tokenizer = made("bpe:512")
    assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]


def test_training_is_deterministic_across_processes_and_threads() -> None:
    code = (
        "import json, pathlib\n"
        "from data_pipeline.tokenizers import make_tokenizer\n"
        "folder = pathlib.Path(json.__file__).parent\n"
        "texts = [(folder / name).read_text() for name in ('decoder.py', 'encoder.py', 'scanner.py')]\n"
        "print(make_tokenizer('bpe:512', lambda: iter(texts)).sha256())"
    )
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.stdout.strip() == made("bpe:512").sha256(), done.stderr


@pytest.mark.parametrize("spec", ["bytes", "characters", "bpe:512"])
def test_saved_is_loaded_by_us_and_by_transformers(spec: str, tmp_path: Path) -> None:
    tokenizer = made(spec)
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    foreign = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert foreign.encode(CORPUS[0], add_special_tokens=False) == tokenizer.encode(CORPUS[0])
    copies = [Tokenizer.load(tmp_path), make_tokenizer(str(tmp_path / "tokenizer.json"), lambda: iter(()))]
    for copy in [*copies, pickle.loads(pickle.dumps(tokenizer))]:
        assert copy.sha256() == tokenizer.sha256()
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.encode("<|mask|> x") == tokenizer.encode("<|mask|> x")


def test_a_foreign_tokenizer_gets_what_it_lacks_and_keeps_what_it_has(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1, "b": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.end_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 4, 5, 6)
    assert tokenizer.encode("a b a") == [0, 2, 0]
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").sha256() == tokenizer.sha256()


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:258", "bpe:-4", "bpe:x", "byte", "no/such/folder"])
def test_an_illegal_spec_names_the_legal_ones(spec: str) -> None:
    with pytest.raises(ValueError, match=r"legal: bytes, characters, bpe:N"):
        make_tokenizer(spec, lambda: iter(CORPUS))


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        make_tokenizer(str(tmp_path), lambda: iter(()))
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere")


@given(values=st.lists(st.integers(0, 99)))
def test_values_read_as_their_numbers(values: list[int]) -> None:
    tokenizer = value_tokenizer(100)
    assert tokenizer.encode(" ".join(map(str, values))) == values
    assert tokenizer.encode("\n".join(map(str, values))) == values
    assert tokenizer.decode(values) == " ".join(map(str, values))


def test_the_specials_follow_the_values(tmp_path: Path) -> None:
    tokenizer = value_tokenizer(10)
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.end_id, tokenizer.vocab_size) == (10, 11, 12, 13)
    assert tokenizer.decode([1, 10, 2], keep_special=True) == "1 <|mask|> 2"
    assert tokenizer.decode([1, 10, 2]) == "1 2"
    tokenizer.save(tmp_path)
    foreign = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert foreign.encode("3 1 9", add_special_tokens=False) == [3, 1, 9]
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.sha256(), copy.vocab_size, copy.mask_id) == (tokenizer.sha256(), 13, 10)


@pytest.mark.parametrize("word", ["10", "-1", "01", "x", "<|mask|>", "<|unk|>"])
def test_words_that_are_no_values_are_refused(word: str, tmp_path: Path) -> None:
    refusal = rf"no token reads as '{re.escape(word)}'; legal words, with blanks between: 0 to 9"
    value_tokenizer(10).save(tmp_path)
    for tokenizer in (value_tokenizer(10), Tokenizer.load(tmp_path)):
        with pytest.raises(ValueError, match=refusal):
            tokenizer.encode(f"1 {word} 2")
        with pytest.raises(ValueError, match=refusal):
            tokenizer.encode_batch(["1 2", f"{word} 3"])


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="0 values has no tokens; give at least 1"):
        value_tokenizer(0)
