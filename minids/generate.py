"""Text from a model: the prompt in one pass (prefill), then token after token with the cache (decode).

    python -m minids.generate DIR --prompt "def "

DIR is a run of `minids.train`, or any folder or hub id with config.json, safetensors and tokenizer.json.
"""

import argparse
import json
import sys
from numbers import Integral
from pathlib import Path

import torch

from minids.layers import rope_tables
from minids.model import Transformer, check_vocabulary, evaluating
from minids.numerics import device_fault


@torch.no_grad()
def generate(
    model, tokens, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, use_cache=True, stop_token=None, stream=None
):
    """Continue `tokens` [B,T] by `max_new_tokens`: [B,T+n] int64 on the model's device.

    Temperature 0 takes the likeliest token; above, it samples from the smallest set of tokens whose probabilities
    reach `top_p` (with a `seed`, the same ones each time). A row that has given `stop_token` is filled with it.
    `stream` is called with each new column [B]. Raises ValueError for arguments that cannot work.
    """
    check_prompt(model.cfg, tokens, max_new_tokens)
    check_sampling(temperature, top_p)
    tokens = tokens.to(next(model.parameters()).device)
    B, T = tokens.shape
    random = None if seed is None else torch.Generator(tokens.device).manual_seed(int(seed))
    result = torch.cat([tokens, tokens.new_full((B, max_new_tokens), stop_token or 0)], 1)
    finished = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    cache = model.new_cache(B, T + max_new_tokens) if use_cache else None
    with evaluating(model):
        for end in range(T, T + max_new_tokens):
            start = cache[0].length if cache else 0
            new = choose(model(result[:, start:end], cache, last_only=True)[:, -1], temperature, top_p, random)
            if stop_token is not None:
                new = new.masked_fill(finished, stop_token)
                finished |= new == stop_token
            result[:, end] = new
            if stream:
                stream(new)
            if stop_token is not None and finished.all():
                break
    return result


@torch.no_grad()
def speculate(model, tokens, max_new_tokens):
    """What `generate` gives for one row `tokens` [1,T] at temperature 0, and in how many passes: ([1,T+n], passes).

    A pass reads the newest token and, behind it, what MTP module 1 has drafted. Where the model chooses the draft too,
    the pass gives a second token; else the cache forgets the draft (2211.17192; V3 section 2.2). It pays where a pass
    takes as long for two tokens as for one; on a CPU `generate` is faster, which has the step of decode.py. Raises
    ValueError for more rows than one, for a model without MTP, and as generate does.
    """
    check_prompt(model.cfg, tokens, max_new_tokens)
    if len(tokens) > 1 or not model.mtp:
        raise ValueError(f"{len(tokens)} rows, {len(model.mtp)} MTP modules; speculate takes one row, a model with MTP")
    ids, end, passes = tokens.to(next(model.parameters()).device), tokens.shape[1] + max_new_tokens, 0
    draft, cache, (of_module, *_) = ids[:, :0], model.new_cache(1, end), model.new_cache(1, end)
    with evaluating(model):
        while ids.shape[1] < end:
            start, passes = cache[0].length, passes + 1
            h = model.hidden(torch.cat([ids[:, start:], draft], 1), cache)
            chosen = model.lm_head(h[:, ids.shape[1] - 1 - start :]).argmax(-1)
            if draft.numel() and chosen[0, 0] != draft:
                h, chosen = h[:, :-1], chosen[:, :1]
                for layer in cache:
                    layer.length -= 1
            ids = torch.cat([ids, chosen], 1)
            cos, sin = rope_tables(model.cfg, torch.arange(start, start + h.shape[1], device=h.device))
            h = model.mtp[0](model.embed_tokens(ids[:, start + 1 :]), h, cos, sin, of_module)
            draft = model.lm_head(h[:, -1:]).argmax(-1)
    return ids[:, :end], passes


def choose(logits, temperature=0.0, top_p=1.0, random=None):
    """The next token [B] int64 from logits [B,V]: the largest, or one drawn from the nucleus of `top_p`."""
    if min(temperature, top_p) < 1e-30:  # fp32 would have infinities or an empty nucleus; the likeliest is left
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p == 1:
        return torch.multinomial(probabilities, 1, generator=random)[:, 0]
    ordered, ids = probabilities.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # what comes before already reaches top_p
    return ids.gather(-1, torch.multinomial(ordered, 1, generator=random))[:, 0]


def check_prompt(cfg, tokens, max_new_tokens):
    """Raise ValueError where `tokens` are not [B,T] int64 ids of the vocabulary, or leave no room for the new ones."""
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        given = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"tokens are {given}; give a [B,T] int64 tensor with at least one token")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give a whole number, 0 or more")
    check_vocabulary(tokens, cfg)
    T, room = tokens.shape[1], cfg.max_position_embeddings
    if T + max_new_tokens > room:
        need = f"{T} tokens and {max_new_tokens} new ones need {T + max_new_tokens} positions"
        remedy = f"shorten the prompt, or ask for at most {max(room - T, 0)} new tokens"
        raise ValueError(f"{need}; max_position_embeddings is {room}: {remedy}")


def check_sampling(temperature, top_p):
    """Raise ValueError for a temperature or a top_p that nothing can be drawn with."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; give 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give a probability above 0, at most 1")


# The command line ------------------------------------------------------------------------------------------------


class Printer:
    """Prints tokens as they come, and holds back the bytes of a character that is not whole yet."""

    def __init__(self, tokenizer, file=None):
        self.tokenizer, self.file, self.ids, self.shown = tokenizer, file or sys.stdout, [], 0

    def __call__(self, new):
        self.ids.append(int(new[0]))
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.flush(text)

    def flush(self, text=None):
        """Print what is not yet shown of `text` (None: of all tokens so far)."""
        text = self.tokenizer.decode(self.ids) if text is None else text
        self.file.write(text[self.shown :])
        self.file.flush()
        self.shown = len(text)


def find_model(name):
    """The folder of the model that `name` means: a run's DIR/model, a model's folder, or a hub id.

    Raises FileNotFoundError.
    """
    from minids import hub

    folder = Path(name)
    if (folder / "run.json").exists():
        if not (folder / "model" / "config.json").exists():
            again = f"python -m minids.train --resume {folder}"
            raise FileNotFoundError(f"the run in {folder} is not finished; continue it with: {again}")
        return folder / "model"
    return hub.locate(name)


def read_tokenizer(folder):
    """The tokenizer of a model's folder and the id of its end-of-text token (None where it names none)."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; put the model's there, or call minids.generate")
    stop = None
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            stop = json.loads((folder / name).read_text()).get("eos_token_id", stop)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers has no class of its own
        raise ValueError(f"{folder / 'tokenizer.json'} is no whole tokenizer ({error}); fetch it again") from None
    return tokenizer, stop[0] if isinstance(stop, list) else stop


def build_parser():
    """The arguments of the command."""
    parser = argparse.ArgumentParser("python -m minids.generate", description="Print a model's continuation of a text.")
    parser.add_argument("model", metavar="DIR", help="a run of minids.train, a model's folder, or a hub id")
    parser.add_argument("--prompt", default="", help="the text to continue (default: the start of a file)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample among this much probability (default 0.95)")
    parser.add_argument("--seed", type=int, help="give the same text each time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv=None):
    """Print the prompt and its continuation; the exit code is 0, 2 for bad input and 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        if fault := device_fault(args.device):
            raise ValueError(f"--device is {args.device}, which torch cannot use here: {fault}")
        args.prompt.encode()  # raises for bytes on the command line that are not UTF-8
        folder = find_model(args.model)
        tokenizer, stop = read_tokenizer(folder)
        model = Transformer.from_pretrained(folder, device=args.device)
        ids = tokenizer.encode(args.prompt).ids or [stop or 0]
        printer = Printer(tokenizer)
        sys.stdout.write(args.prompt)
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        generate(model, torch.tensor([ids]), args.max_new_tokens, **sampling, stop_token=stop, stream=printer)
        printer.flush()
        print()
    except KeyboardInterrupt:
        print()
        return 130
    except (ValueError, OSError) as error:
        print(f"minids.generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
