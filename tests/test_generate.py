"""Generation: the cache changes nothing, sampling keeps to its rules, bad prompts get one sentence."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minids.config import ModelConfig
from minids.generate import Printer, choose, generate, main


class Counting(nn.Module):
    """A stand-in whose likeliest next token is the last one plus 1."""

    def __init__(self, vocab_size=10):
        super().__init__()
        self.cfg = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=32)
        self.weight, self.calls = nn.Parameter(torch.zeros(())), []

    def new_cache(self, batch, max_len):
        return [SimpleNamespace(length=0, max_len=max_len)]

    def forward(self, tokens, cache=None, last_only=False):
        assert not self.training
        self.calls.append(tokens.shape[1])
        if cache:
            cache[0].length += tokens.shape[1]
        return nn.functional.one_hot((tokens[:, -1:] + 1) % self.cfg.vocab_size, self.cfg.vocab_size).float()


def small(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "kv_lora_rank": 16, "v_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16}
    return ModelConfig(**{**sizes, "n_routed_experts": 8, "num_experts_per_tok": 2, **changes})


def test_prefill_once_then_one_token_at_a_time():
    model = Counting().train()
    assert generate(model, torch.tensor([[3, 4, 5]]), 4).tolist() == [[3, 4, 5, 6, 7, 8, 9]]
    assert model.calls == [3, 1, 1, 1] and model.training
    assert generate(model, torch.tensor([[3]]), 0).tolist() == [[3]]
    assert generate(model, torch.tensor([[3]]), np.int64(2)).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
def test_with_and_without_cache_the_tokens_are_the_same(attention, sampling):
    from minids.model import Transformer

    torch.manual_seed(0)
    model = Transformer(small(attention=attention, num_key_value_heads=2, initializer_range=0.2))
    prompt = torch.randint(0, 64, (3, 7))
    cached = generate(model, prompt, 20, **sampling)
    assert cached.shape == (3, 27) and cached.dtype == torch.int64
    assert torch.equal(cached[:, :7], prompt)
    assert torch.equal(cached, generate(model, prompt, 20, use_cache=False, **sampling))


def test_rows_that_stopped_are_filled_with_the_stop_token_and_the_others_go_on():
    model, columns = Counting(), []
    out = generate(model, torch.tensor([[1], [4]]), 9, stop_token=6, stream=lambda new: columns.append(new.tolist()))
    assert out.tolist() == [[1, 2, 3, 4, 5, 6, 6, 6, 6, 6], [4, 5, 6, 6, 6, 6, 6, 6, 6, 6]]
    assert columns == [[2, 5], [3, 6], [4, 6], [5, 6], [6, 6]], "decoding ends where all rows have stopped"


def test_a_seed_repeats_the_sample_and_leaves_the_global_random_state_alone():
    logits, state = torch.randn(2, 50), torch.get_rng_state()
    draws = [choose(logits, 1.0, 0.9, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"temperature": 1e-45}, {"temperature": 1, "top_p": 1e-300}])
def test_the_smallest_temperature_and_top_p_leave_the_likeliest(options):
    ids = generate(Counting(), torch.tensor([[3]]), 4, seed=np.int64(2), **options)
    assert ids.tolist() == [[3, 4, 5, 6, 7]]


def test_a_model_is_in_its_mode_again_when_its_forward_fails():
    model = Counting().train()
    model.forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(model, torch.tensor([[3]]), 1)
    assert model.training


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    random = torch.Generator().manual_seed(0)
    assert set(choose(logits, 1.0, 0.7, random).tolist()) == {0, 1}
    assert set(choose(logits, 1.0, 0.01, random).tolist()) == {0}
    counts = torch.bincount(choose(logits, 1.0, 1.0, random), minlength=4) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)
    assert set(choose(logits, 0.05, 1.0, random).tolist()) == {0}, "a low temperature sharpens"


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (torch.tensor([1, 2]), {}, "[2] torch.int64"),
        (torch.tensor([[1, 2]], dtype=torch.int32), {}, "torch.int32"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "at least one token"),
        ([[1, 2]], {}, "list"),
        (torch.tensor([[1, 10]]), {}, "this vocabulary has 0 to 9"),
        (torch.tensor([[-1]]), {}, "run from -1"),
        (torch.zeros(1, 30, dtype=torch.int64), {}, "at most 2 new tokens"),
        (torch.tensor([[1]]), {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (torch.tensor([[1]]), {"temperature": -0.5}, "temperature is -0.5"),
        (torch.tensor([[1]]), {"top_p": 0.0}, "top_p is 0.0"),
        (torch.tensor([[1]]), {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_arguments_say_what_was_given_and_what_to_do(tokens, options, words):
    with pytest.raises(ValueError) as error:
        generate(Counting(), tokens, **{"max_new_tokens": 5, **options})
    assert words in str(error.value)


def test_the_printer_waits_for_whole_characters():
    texts = {1: "a", 2: "a\ufffd", 3: "aé"}
    tokenizer = SimpleNamespace(decode=lambda ids: texts[len(ids)])
    out = io.StringIO()
    printer = Printer(tokenizer, out)
    shown = []
    for token in (7, 8, 9):
        printer(torch.tensor([token]))
        shown.append(out.getvalue())
    assert shown == ["a", "a", "aé"]


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 2
    (tmp_path / "run.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path), "--device", "nowhere"]) == 2 and main([str(tmp_path), "--prompt", "\udcff"]) == 2
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    assert main([str(tmp_path)]) == 2
    words = ["neither a folder", "--resume", "--device is nowhere, which torch", "utf-8", "no whole tokenizer"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(words) and all(map(str.__contains__, errors, words)), errors
