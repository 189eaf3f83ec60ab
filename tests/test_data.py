"""Text, split by file; a vocabulary that keeps every byte; batches by (seed, step); bits per byte counted once."""

import gzip
import itertools
import lzma
import math
import os
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from minids import data
from minids.corpus import read_files
from minids.data import DataError, batch, encode_files, load_corpus, load_tokenizer, window_starts


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def texts(count):
    draw, words = random.Random(0), ["alpha", "beta", "gämma", "\n"]
    return {f"part{i % 3}/{i}.txt": " ".join(draw.choices(words, k=60)) for i in range(count)}


@pytest.fixture
def corpus(tmp_path):
    return load_corpus(write(tmp_path / "text", texts(50)), tmp_path / "cache")


# The corpus ------------------------------------------------------------------------------------------------------


def test_the_split_is_by_file_and_stable(corpus, tmp_path):
    every = [text.encode() for text in texts(50).values()]
    assert sorted(corpus.train + corpus.heldout) == sorted(every) and 0 < len(corpus.heldout) < 15
    elsewhere = load_corpus(write(tmp_path / "copy", texts(50)))
    assert elsewhere.hash == corpus.hash and elsewhere.heldout == corpus.heldout
    more = load_corpus(write(tmp_path / "copy", {"new.txt": "a new file"}))
    assert set(corpus.heldout) <= set(more.heldout) and set(corpus.train) <= set(more.train), "no file changes sides"
    assert more.hash != corpus.hash


def test_files_that_are_equal_empty_hidden_or_not_utf8(tmp_path, capsys):
    files = {"a.txt": "one", "b/c.txt": "one", "d.txt": "two", "e.txt": "", ".hidden": "x", "__pycache__/f": "y"}
    write(tmp_path, {**files, "latin.txt": "é".encode("latin-1"), "zero.bin": b"\0text"})
    corpus = load_corpus(tmp_path)
    assert sorted(corpus.train + corpus.heldout) == [b"one", b"two"]
    assert corpus.note == "2 files are not UTF-8 text and left out" and corpus.note in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")
def test_names_of_files_need_not_be_utf8(tmp_path):
    for name in (b"\xff.txt", b"\xfe.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(str(name).encode())
    assert len(load_corpus(tmp_path).train) == 1


def test_one_file_is_split_into_blocks(tmp_path):
    lines = "".join(f"line {i} ends with é\n" for i in range(1000))
    corpus = load_corpus(write(tmp_path, {"one.txt": lines}) / "one.txt")
    blocks = corpus.train + corpus.heldout
    assert len(corpus.heldout) > 2 and f"one file, split into {len(blocks)} blocks" in corpus.note
    assert sorted(b"".join(blocks).splitlines()) == sorted(lines.encode().splitlines())
    assert all(block.endswith(b"\n") for block in blocks)
    without_lines = load_corpus(write(tmp_path, {"long.txt": "é" * 999}) / "long.txt")
    assert b"".join(without_lines.train + without_lines.heldout) == ("é" * 999).encode()


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no data 'nothing'; give stdlib, installed"):
        load_corpus("nothing")
    write(tmp_path, {"only.bin": b"\xff\xfe", "empty": ""})
    with pytest.raises(DataError, match="has no text: 1 files are not UTF-8"):
        load_corpus(tmp_path)
    with pytest.raises(DataError, match="too short to hold a part of it out"):
        load_corpus(write(tmp_path, {"short.txt": "x"}) / "short.txt")
    assert read_files([("gone", tmp_path / "gone")]) == ([], 1)


def test_gzip_and_xz_are_those_of_python_and_a_damaged_cache_is_made_again(corpus, tmp_path):
    size = sum(map(len, corpus.heldout))
    want = 8 * sum(len(gzip.compress(text, 9)) for text in corpus.heldout) / size
    assert corpus.gzip_bpb == want
    assert corpus.xz_bpb == 8 * len(lzma.compress(b"".join(corpus.heldout), preset=9 | lzma.PRESET_EXTREME)) / size
    (cached,) = (tmp_path / "cache").glob("gzip-*.json")
    for damage in ("", "{", "[]"):
        cached.write_text(damage)
        again = load_corpus(tmp_path / "text", tmp_path / "cache")
        assert again.gzip_bpb == want and float(cached.read_text()) == want


# The vocabulary --------------------------------------------------------------------------------------------------


def test_the_tokenizer_keeps_every_byte(corpus):
    tokenizer = load_tokenizer(corpus, 300)
    assert tokenizer.get_vocab_size() <= 300 and tokenizer.token_to_id("<|endoftext|>") == 0
    every = "".join(map(chr, range(1, 400)))
    for text in ("", " a  b\t\r\n", "<|endoftext|>", "x<|endoftext|>y", "é漢🙂\x00\x7f", every):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text and 0 not in ids


def test_a_vocabulary_is_cached_and_made_again_when_damaged(corpus, tmp_path):
    first = load_tokenizer(corpus, 300).to_str()
    (path,) = (tmp_path / "cache").glob("bpe-300-*.json")
    for damage in (b"", path.read_bytes()[:-9], b"\xff"):
        path.write_bytes(damage)
        assert load_tokenizer(corpus, 300).to_str() == first
    with pytest.raises(DataError, match="vocab_size is 256; 256 bytes and the end of text need 257"):
        load_tokenizer(corpus, 256)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    corpus = load_corpus(write(tmp_path, {**texts(9), "file": "x"}), tmp_path / "file" / "cache")
    assert load_tokenizer(corpus, 257).get_vocab_size() == 257 and corpus.gzip_bpb > 0


def test_files_are_one_row_with_an_end_of_text_between_two(corpus):
    tokenizer = load_tokenizer(corpus, 300)
    row = encode_files(tokenizer, [b"one", b"two", b"<|endoftext|>"])
    assert row.dtype == torch.uint16 and (row == 0).sum() == 2 and row[0] != 0 and row[-1] != 0
    assert len(encode_files(tokenizer, [])) == 0


# Batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = torch.arange(1000, dtype=torch.int32)
    want = batch(tokens, 7, 3, 4, 16)
    for step, seed in ((0, 3), (99, 3), (7, 4)):
        assert not torch.equal(batch(tokens, step, seed, 4, 16)[0], want[0])
    data.sequence_order.cache_clear()
    again = batch(tokens, 7, 3, 4, 16)
    assert torch.equal(again[0], want[0]) and torch.equal(again[1], want[0] + 1) and want[0].dtype == torch.int64


@pytest.mark.parametrize(("length", "seq_len"), [(1000, 16), (17, 16), (33, 16), (100, 1)])
def test_a_pass_takes_each_sequence_once(length, seq_len):
    tokens, count = torch.arange(length), max(1, (length - seq_len) // seq_len)
    for epoch in range(3):
        starts = [batch(tokens, epoch * count + i, 0, 1, seq_len)[0][0, 0].item() for i in range(count)]
        offset = min(starts)
        assert sorted(starts) == [offset + seq_len * i for i in range(count)]


def test_too_few_tokens_are_refused():
    with pytest.raises(DataError, match="there are 16 tokens; sequences of 16 need 17"):
        batch(torch.arange(16), 0, 0, 1, 16)


# Bits per byte ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 23, 24, 25])
def test_windows_predict_every_token_once_with_half_a_window_before_it(count, seq_len):
    starts, window = window_starts(count, seq_len)
    done = 0
    for start, before in starts:
        assert start >= 0 and start + window <= count and before == done
        assert start == 0 or before - start >= window // 2
        done = start + window
    assert done == count


class Guesser(torch.nn.Module):
    """Uniform logits; keeps the windows that it was given."""

    def __init__(self, vocab_size):
        super().__init__()
        self.weight, self.vocab_size, self.seen = torch.nn.Parameter(torch.zeros(())), vocab_size, []

    def forward(self, tokens):
        assert not self.training
        self.seen.append(tokens)
        return torch.zeros(*tokens.shape, self.vocab_size)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(8, 3), (64, 1), (10**6, 2)])
def test_a_uniform_model_needs_log2_v_bits_a_token(corpus, seq_len, batch_size):
    tokenizer = load_tokenizer(corpus, 300)
    tokens, model = encode_files(tokenizer, corpus.heldout), Guesser(300)
    bits = data.heldout_bits_per_byte(model, tokenizer, corpus, seq_len, batch_size)
    assert bits == pytest.approx(math.log2(300) * len(tokens) / sum(map(len, corpus.heldout)), rel=1e-6)
    assert model.training and model.seen[0][0, 0] == 0, "the first token follows an end of text"
    assert max(map(len, model.seen)) <= batch_size


def test_a_model_that_knows_the_text_needs_no_bits(corpus):
    tokenizer = load_tokenizer(corpus, 300)
    following = dict.fromkeys(range(300), 0)
    corpus = SimpleNamespace(heldout=[b"alpha"])
    row = [0, *encode_files(tokenizer, corpus.heldout).tolist()]
    following |= dict(itertools.pairwise(row))

    class Knowing(Guesser):
        def forward(self, tokens):
            return 100 * torch.nn.functional.one_hot(tokens.apply_(following.get), 300).float()

    assert data.heldout_bits_per_byte(Knowing(300), tokenizer, corpus, 2, 2) < 1e-6
