"""Tokens to learn from: a byte-pair vocabulary, batches, and the measure in bits per byte.

The texts are those of corpus.py, whose `load_corpus`, `Corpus` and `DataError` are at home here too.
"""

import hashlib
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minids.corpus import Corpus, DataError, cached, load_corpus
from minids.model import evaluating

__all__ = ["Corpus", "DataError", "batch", "encode_files", "heldout_acceptance", "heldout_bits_per_byte", "load_corpus"]
__all__ += ["load_tokenizer"]

END_OF_TEXT = "<|endoftext|>"  # token id 0


def load_tokenizer(corpus, vocab_size):
    """A byte-level BPE of up to `vocab_size` tokens, trained on corpus.train and cached; 0 is the end of a text.

    What it encodes decodes to the same bytes. Raises DataError for a vocabulary too small for the 256 bytes.
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size}; 256 bytes and the end of text need 257")

    def train(path):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = {"special_tokens": [END_OF_TEXT], "initial_alphabet": alphabet, "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
        tokenizer.train_from_iterator((text.decode() for text in corpus.train), trainer)
        tokenizer.save(str(path))

    name = f"bpe-{vocab_size}-{corpus.hash}.json"
    tokenizer = cached(name, corpus.cache_dir, train, lambda path: Tokenizer.from_file(str(path)))
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a text is that text
    return tokenizer


def encode_files(tokenizer, files):
    """The tokens of all `files` in one row, an end-of-text token between two; uint16 (int32 for large vocabularies)."""
    tokenizer.encode_special_tokens = True
    dtype = torch.uint16 if tokenizer.get_vocab_size() <= 2**16 else torch.int32
    end, rows, waiting, size = torch.zeros(1, dtype=dtype), [], [], 0
    for number, text in enumerate(files):
        waiting.append(text.decode())
        size += len(text)
        if size > 2**22 or number == len(files) - 1:  # an encoding takes far more memory than its ids
            for encoding in tokenizer.encode_batch_fast(waiting):
                rows += [torch.tensor(encoding.ids, dtype=dtype), end]
            waiting, size = [], 0
    return torch.cat(rows[:-1]) if rows else end[:0]


def batch(tokens, step, seed, batch_size, seq_len):
    """(inputs, targets) [B,T] int64 of training step `step`: a function of (seed, step) and the tokens alone.

    One pass cuts the row of tokens into sequences, at another offset each time, and takes each once, shuffled.
    Raises DataError where the tokens are fewer than a sequence and its last target.
    """
    if len(tokens) <= seq_len:
        raise DataError(f"there are {len(tokens)} tokens; sequences of {seq_len} need {seq_len + 1}: take shorter ones")
    count = max(1, (len(tokens) - seq_len) // seq_len)
    samples = range(step * batch_size, (step + 1) * batch_size)
    places = [sequence_order(len(tokens), seq_len, seed, i // count) for i in samples]
    starts = [offset + seq_len * int(order[i % count]) for i, (offset, order) in zip(samples, places, strict=True)]
    rows = torch.stack([tokens[start : start + seq_len + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=4)
def sequence_order(length, seq_len, seed, epoch):
    """Offset and order of the sequences of one pass."""
    count = max(1, (length - seq_len) // seq_len)
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    spare = min(seq_len - 1, length - 1 - count * seq_len)
    offset = int(torch.randint(spare + 1, (1,), generator=random))
    return offset, torch.randperm(count, generator=random)


def heldout_bits_per_byte(model, tokenizer, corpus, seq_len, batch_size):
    """Bits that `model` needs for each byte of the held-out files: see heldout_nats."""
    return bits_per_byte(*heldout_nats(model, tokenizer, corpus, seq_len, batch_size))


@torch.no_grad()
def heldout_nats(model, tokenizer, corpus, seq_len, batch_size):
    """(nats per token, tokens, bytes) of the held-out files under `model`, the ends of text between them included.

    Every token is predicted once. Windows of `seq_len` overlap by half: a token has at least that half before it, but
    for those of the first window.
    """
    tokens = encode_files(tokenizer, corpus.heldout)
    row = torch.cat([torch.zeros(1, dtype=torch.int64), tokens.long()])  # the first token follows an end of text
    starts, window = window_starts(len(row) - 1, seq_len)
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model):
        for first in range(0, len(starts), batch_size):
            chunk = starts[first : first + batch_size]
            inputs = torch.stack([row[start : start + window] for start, _ in chunk])
            targets = torch.stack([row[start + 1 : start + 1 + window] for start, _ in chunk])
            for line, (start, done) in zip(targets, chunk, strict=True):
                line[: done - start] = -100  # an earlier window has predicted them
            logits = model(inputs.to(device)).flatten(0, 1).float()
            nats += F.cross_entropy(logits, targets.to(device).flatten(), reduction="sum")
    return float(nats) / len(tokens), len(tokens), sum(map(len, corpus.heldout))


@torch.no_grad()
def heldout_acceptance(model, tokenizer, corpus, seq_len, windows=32):
    """For each MTP module k of `model`, the share of positions where its likeliest token t+k+1 is the main head's too.

    For k = 1 that is what `speculate` would accept along the held-out text (V3 reports 85 to 90% along what it writes).
    Measured on `windows` of `seq_len` tokens, at equal distances; [] where the text is shorter than the modules look.
    """
    hits = [0.0] * len(model.mtp)
    tokens = encode_files(tokenizer, corpus.heldout) if hits else []
    if len(tokens) <= len(hits):
        return []
    last = max(0, len(tokens) - seq_len)
    with evaluating(model):
        for start in [last * i // (windows - 1) for i in range(windows)]:
            row = tokens[None, start : start + seq_len].long().to(next(model.parameters()).device)
            h = model.hidden(row)
            chosen = model.lm_head(h).argmax(-1)
            for k, h_k in enumerate(model.mtp_hidden(row, h), 1):
                hits[k - 1] += float((model.lm_head(h_k).argmax(-1) == chosen[:, k:]).double().mean())
    return [total / windows for total in hits]


def bits_per_byte(nats_per_token, tokens, nbytes):
    """Bits for each byte of a text of `nbytes` bytes, whose `tokens` tokens cost `nats_per_token` nats on average."""
    return nats_per_token * tokens / math.log(2) / nbytes


def window_starts(count, seq_len):
    """[(start, tokens predicted before)] of the windows over `count` targets, and the windows' length."""
    window, stride = min(seq_len, count), max(1, seq_len // 2)
    starts = [0]
    while starts[-1] + window < count:
        starts.append(min(starts[-1] + stride, count - window))
    return [(start, last + window if start else 0) for start, last in zip(starts, [0, *starts], strict=False)], window
