"""The model of the learner's own functions: those that passed are used, all of them, and the rest is the reference."""

import ast
import copy
import re

import nbformat
import pytest
import torch
from cells import Notebook

import minids
from minids import fp8, optim
from minids.lab import check, exercises, keep, plots, portrait, progress, solution
from minids.lab.assemble import MiniDeepSeek, Parts
from minids.lab.judge import PASS, judge
from minids.lab.parts import KERNELS, USED, disagreement
from minids.lab.source import ROOT
from minids.model import Block
from minids.numerics import relative_error

IDS = [number for numbers in USED.values() for number in numbers]
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "kv_lora_rank": 16}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
TINY |= {"v_head_dim": 8, "n_routed_experts": 16, "initializer_range": 0.2, "max_position_embeddings": 64}
MODELS = {
    "experts in groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "queries through a latent": {"q_lora_rank": 24, "n_shared_experts": 2},
    "dense": {"n_routed_experts": 0},
    "MHA": {"attention": "mha", "n_routed_experts": 0},
    "GQA": {"attention": "gqa", "num_key_value_heads": 2, "n_routed_experts": 0},
}
each_model = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDS_HOME", str(tmp_path / ".minids"))
    monkeypatch.setattr(progress, "UNSAVED", {})
    return tmp_path / ".minids"


def pair(kind, parts=None):
    """(minids' model, the assembled one) with the same weights, and tokens."""
    torch.manual_seed(0)
    cfg = minids.ModelConfig(**{**TINY, **MODELS[kind]})
    theirs = minids.Transformer(cfg)
    for moe in theirs.moe_layers():
        moe.gate.e_score_correction_bias.uniform_(-2, -1)
    ours = MiniDeepSeek(cfg, parts or Parts(own={}))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randint(0, cfg.vocab_size, (3, 21))


def everything(model, tokens):
    """All that a model of a lesson does: a training step, logits, and decoding after a prompt; gives the text."""
    model.train().loss(tokens, tokens)[0].backward()
    model.update_expert_bias(0.001)
    return minids.generate(model.eval(), tokens[:, :9], 6)


# All of it the reference ---------------------------------------------------------------------------------------------


@each_model
def test_it_is_minids_model(kind, monkeypatch):
    theirs, ours, tokens = pair(kind)
    wanted = theirs.loss(tokens, tokens)
    wanted[0].backward()
    moved, logits = theirs.update_expert_bias(0.001), theirs.eval()(tokens)
    text = minids.generate(theirs, tokens[:, :9], 12)
    monkeypatch.setattr(Block, "forward", None)  # nothing of minids' layers runs
    got = ours.loss(tokens, tokens)
    got[0].backward()
    assert torch.allclose(got[0], wanted[0], rtol=1e-5) and torch.allclose(got[1], wanted[1], rtol=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(mine.grad, other.grad) < 1e-4, name
    for mine, other in zip(ours.update_expert_bias(0.001), moved, strict=True):
        assert torch.equal(mine, other)
    assert relative_error(ours.eval()(tokens), logits) < 1e-5
    assert torch.equal(minids.generate(ours, tokens[:, :9], 12), text)
    cache = ours.new_cache(3, 40)
    steps = [ours(piece, cache) for piece in tokens.split([8, 1, 5, 7], 1)]  # several tokens after others, too
    assert relative_error(torch.cat(steps, 1), logits) < 1e-5


def test_it_learns_as_minids_does():
    losses = []
    for model in pair("experts in groups")[:2]:
        torch.manual_seed(1)
        optimizers, found = optim.build_optimizers(model, 0.01, 0.01, 0.1), []
        for _ in range(6):
            tokens = torch.arange(3 * 21).view(3, 21) % 64
            loss, nats = model.loss(tokens, tokens.roll(-1, 1))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            model.update_expert_bias(0.001)
            found.append(nats)
        losses.append(torch.stack(found))
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert torch.allclose(*losses, rtol=0.05)  # roundings choose other experts now and then


def test_fp8_is_minids_fp8():
    theirs, ours, tokens = pair("dense", Parts(fp8=True, own={}))
    fp8.convert(theirs, impl="torch")
    logits = theirs(tokens)
    assert relative_error(ours(tokens), logits) < 1e-3
    for model in (theirs, ours):
        model.loss(tokens, tokens)[0].backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert ((mine.grad - other.grad).norm() / other.grad.norm()).item() < 0.02, name
    theirs, ours, tokens = pair("experts in groups", Parts(fp8=True, own={}))
    fp8.convert(theirs, impl="torch")
    assert torch.allclose(ours.loss(tokens, tokens)[0], theirs.loss(tokens, tokens)[0], rtol=1e-2)
    assert everything(ours, tokens).shape == (3, 15)


MADE = [part.exercise for part in Parts(own={}).all.values() if part.reference is not part.exercise.reference]


@pytest.mark.parametrize("exercise", MADE, ids=lambda exercise: exercise.name)
def test_what_is_put_together_passes_its_exercise(exercise):
    assert judge(exercise, Parts(own={}).all[exercise.name].reference).verdict == PASS


def test_every_answer_has_its_place():
    assert len(set(IDS)) == len(IDS)
    kernels = {e.id for e in exercises.REGISTRY.values() if e.kernel is not None}
    assert KERNELS.keys() <= kernels and not kernels & set(IDS)


def test_weights_go_out_and_in(tmp_path):
    theirs, ours, tokens = pair("experts in groups")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.save_pretrained(tmp_path / "model")
    opened = minids.Transformer.from_pretrained(tmp_path / "model")
    assert relative_error(opened(tokens), ours.eval()(tokens)) < 1e-5


@pytest.mark.parametrize("field", ["topk_method", "norm_topk_prob", "n_shared_experts", "attention_bias"])
def test_what_no_exercise_is_about_is_refused(field):
    changes = {"topk_method": {"topk_method": "greedy", "scoring_func": "softmax"}, "attention_bias": {field: True}}
    cfg = minids.ModelConfig(**TINY, **changes.get(field, {field: 0 if field.startswith("n_") else False}))
    with pytest.raises(ValueError, match=f"{field} is .*no exercise is about that.*minids.Transformer"):
        MiniDeepSeek(cfg, Parts(own={}))


# The learner's -------------------------------------------------------------------------------------------------------


def solve(numbers):
    """Answer these exercises as a learner does: the lessons' solutions, run as cells and checked."""
    for lesson in sorted({number.split(".")[0] for number in numbers}):
        notebook, path = Notebook(), next(solution.SOLUTIONS.glob(f"{lesson}_*.py"))
        text = path.read_text(encoding="utf-8").replace("# BEGIN SOLUTION", "").replace("# END SOLUTION", "")
        for node in ast.parse(text).body:
            call, source = getattr(node, "value", None), ast.get_source_segment(text, node)
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
                notebook.cell(source)
            elif isinstance(node, ast.Assign) and isinstance(call, ast.Call) and ast.unparse(call.func) == "check":
                exercise = exercises.find(ast.unparse(call.args[0])) or exercises.find(f"{lesson}.1")
                name = ast.unparse(node.targets[0])
                if exercise.id in numbers:
                    notebook.scope[name] = check(notebook.scope[exercise.name])
                else:
                    notebook.scope[name] = exercises.reference(exercise.id)


CALLED = set()  # the exercises whose kept function was called
MARKED = """

def marked(fn):
    def call(*arguments, **named):
        from test_assemble import CALLED

        CALLED.add("{id}")
        return fn(*arguments, **named)

    return call


{name} = marked({name})
"""


def mark(folder):
    """Let every kept function in `folder` say that it is called. (sys.setprofile hung in Python 3.11.7.)"""
    for path in folder.iterdir():
        id, _, name = path.stem.partition("_")
        path.write_text(path.read_text(encoding="utf-8") + MARKED.format(id=id, name=name), encoding="utf-8")


def run_lesson(until):
    """The names after the unsolved lesson's code cells, up to the one that has `until`, were run."""
    lesson, notebook = nbformat.read(ROOT / "lessons" / "13_mini_deepseek.ipynb", as_version=4), Notebook()
    for cell in (cell for cell in lesson.cells if cell.cell_type == "code"):
        notebook.cell(cell.source)
        if until in cell.source:
            return notebook.scope
    raise AssertionError(f"no cell of the lesson has {until}")


WITHIN = {  # parts that a whole has within it when it passed: then the model does not call them by themselves
    "compress_kv": ["apply_rope"],
    "decoupled_rope": ["apply_rope"],
    "attend_expanded": ["split_heads_kv"],
    "attend_absorbed": ["absorb_query", "project_values"],
    "route": ["group_limit"],
    "balance_loss": ["load_fractions"],
    "linear_forward": ["fprop", "quantize_blocks", "matmul_blockscaled"],
    "linear_backward": ["dgrad", "wgrad", "matmul_blockscaled"],
    "fprop": ["matmul_blockscaled"],
}


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_the_exercises_have_passed(half, home, capsys):
    passed = set(IDS[half::2])
    solve(passed)
    assert set(progress.load().passed) == passed
    assert {path.name.split("_")[0] for path in (home / "passed").iterdir()} == passed
    mark(home / "passed")
    scope = run_lesson("twin.load_state_dict")  # it says which parts are yours, and that the model is minids'
    assert {part.exercise.id for part in scope["own"]} == passed
    assert not any(part.trouble for part in scope["parts"].all.values())
    assert f"{len(passed)} of {len(IDS)} parts are yours" in capsys.readouterr().out
    parts = [Parts(), Parts(fp8=True)]
    for one in parts:
        assert {part.exercise.id for part in one.all.values() if part.own} == passed - (
            {"01.4", "03.1", "03.4", "07.4"} if one.fp8 else set()
        )

    CALLED.clear()
    for kind in ("experts in groups", "MHA", "GQA"):
        everything(*pair(kind, parts[0])[1:])
    everything(*pair("experts in groups", parts[1])[1:])
    within = {name for whole, names in WITHIN.items() if parts[0].all[whole].own for name in names}
    for name, part in parts[0].all.items():
        other = parts[1].all[name]
        used = {owner: part.calls[owner] + other.calls[owner] for owner in ("yours", "reference")}
        if part.exercise.id in passed:
            assert part.own and not part.trouble, name
            assert part.calls["reference"] == 0 and (other.own is None or other.calls["reference"] == 0), name
            assert (used["yours"] > 0 and part.exercise.id in CALLED) or name in within, name
        else:
            assert used["yours"] == 0 and part.exercise.id not in CALLED, name
            assert used["reference"] > 0 or name in within, name
    assert not CALLED - passed


LEARNERS = """
import time
import torch
def rms_norm(x, weight, eps):
    {first}
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
"""
BROKEN = {
    "raises": ("raise RuntimeError('oh')", "RuntimeError: oh (in line 2 of rms_norm: raise RuntimeError('oh'))"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "dtype": ("return x.double()", "it gives a tensor .* float64 where a tensor .* float32 is needed"),
    "shape": ("x = x[..., None]", "it gives a tensor"),
    "value": ("x = x - 1", "% of the numbers that it gives here are not the reference's"),
    "gradient": ("x = x.detach()", "% of the numbers that it gives here are not"),
    "no result": ("return", "it gives"),
}


def keep_as(home, number, source):
    exercise = exercises.find(number)
    (home / "passed").mkdir(parents=True, exist_ok=True)
    (home / "passed" / f"{exercise.title.replace(' ', '_')}.py").write_text(source.lstrip())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_kept_function_that_fails_here_is_named(kind, home, capsys):
    first, why = BROKEN[kind]
    keep_as(home, "01.1", LEARNERS.format(first=first))
    theirs, ours, tokens = pair("experts in groups", Parts())
    assert ours.parts.rms_norm.owner == "yours"
    text = everything(ours, tokens)
    said = capsys.readouterr().out
    assert said.count("the reference stands in") == 1
    assert said.startswith("01.1 rms_norm: yours passed, and does not work in this model; the reference stands in\n")
    part = ours.parts.rms_norm
    assert part.owner == "reference" and part.calls["yours"] == 0 and part.trouble in said
    assert re.search(why if ".*" in why else re.escape(why), part.trouble), part.trouble
    assert torch.equal(text, everything(theirs, tokens))


@pytest.mark.parametrize("source", ["def rms_norm(x,", "rms_norm = 3", "import nothing_of_this_name", "1 / 0", "\x00"])
def test_a_damaged_file_is_no_part(source, home, capsys):
    keep_as(home, "01.1", source)
    theirs, ours, tokens = pair("dense", Parts())
    said = capsys.readouterr().err
    assert "01.1_rms_norm.py cannot be used" in said and said.endswith("the reference stands in\n")
    assert ours.parts.rms_norm.owner == "reference"
    assert torch.equal(everything(ours, tokens), everything(theirs, tokens))


def test_it_fails_late_in_decoding(home, capsys):
    source = """
import torch
from minids.mla.reference import attend_absorbed as right
def attend_absorbed(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    if c_kv.shape[1] > 12:
        raise ValueError("too long")
    return right(q_nope, q_rope, c_kv, k_rope, kv_b, scale)
"""
    keep_as(home, "04.3", source)
    theirs, ours, tokens = pair("experts in groups", Parts())
    assert torch.equal(minids.generate(ours, tokens[:, :9], 12), minids.generate(theirs, tokens[:, :9], 12))
    part = ours.parts.attend_absorbed
    assert part.calls["yours"] > 0 and part.calls["reference"] > 0 and part.trouble.startswith("ValueError: too long")
    assert capsys.readouterr().out.count("does not work in this model") == 1


def test_a_frame_that_fails_in_decoding_leaves_the_cache_whole(home):
    source = """
def block_forward(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_1(x))
    if x.shape[1] == 1:
        raise ValueError("one token")
    return h + feed_forward(norm_2(h))
"""
    keep_as(home, "13.1", source)
    theirs, ours, tokens = pair("experts in groups", Parts())
    assert torch.equal(minids.generate(ours, tokens[:, :9], 12), minids.generate(theirs, tokens[:, :9], 12))
    assert ours.parts.block_forward.calls["yours"] == 2  # the layers of the prompt


def test_slow_and_right_is_used(home, capsys):
    source = """
import torch
def group_limit(biased, n_group, topk_group):
    out = torch.full_like(biased, float("-inf"))
    size = biased.shape[1] // n_group
    for token in range(len(biased)):
        groups = [biased[token, g * size : (g + 1) * size] for g in range(n_group)]
        order = sorted(range(n_group), key=lambda g: -sum(sorted(groups[g].tolist())[-2:]))
        for g in order[:topk_group]:
            out[token, g * size : (g + 1) * size] = groups[g]
    return out
"""
    keep_as(home, "07.2", source)
    theirs, ours, tokens = pair("experts in groups", Parts())
    assert torch.equal(everything(ours, tokens), everything(theirs, tokens))
    part = ours.parts.group_limit
    assert part.owner == "yours" and part.calls["reference"] == 0 and part.calls["yours"] > 5
    assert part.seconds["yours"] > 0 and not capsys.readouterr().out


def test_autocast_changes_nothing(home, capsys):
    keep_as(home, "01.1", LEARNERS.format(first="assert x.dtype == torch.float32"))
    _, ours, tokens = pair("experts in groups", Parts())
    plain = ours.hidden(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.hidden(tokens), plain)
        loss = ours.loss(tokens, tokens)[0]
    loss.backward()
    assert ours.parts.rms_norm.calls["reference"] == 0 and not capsys.readouterr().out


def test_a_copied_model_counts_into_the_same_parts():
    ours = pair("dense")[1]
    twin = copy.deepcopy(ours)
    assert twin.parts is ours.parts and twin.embed_tokens.weight is not ours.embed_tokens.weight
    with pytest.raises(AttributeError, match="no part 'soft_max'"):
        _ = ours.parts.soft_max


def test_equal_scores_may_be_chosen_in_another_order():
    a = torch.arange(200.0)
    assert not disagreement([a], [a + 1e-4])
    b = a.clone()
    b[:3] += 5
    assert not disagreement([b], [a])
    b[:40] += 5
    assert disagreement([b], [a]).startswith("20% of the numbers")
    assert not disagreement([torch.tensor([float("-inf"), 1.0])], [torch.tensor([float("-inf"), 1.0])])
    assert "3 results, and 2 are needed" in disagreement([a, a, a], [a, a])
    assert disagreement([3], [3.0]) and not disagreement([3.0], [3.0])


def test_the_source_of_a_part_can_be_kept(home):
    """A frame written as the lesson asks for is kept, and is the one that the model uses."""
    cell = Notebook().cell("""
def block_forward(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_1(x))
    return h + feed_forward(norm_2(h))
""")
    check(cell)
    assert keep.source_of(cell) == progress.kept_path(exercises.find("13.1")).read_text()
    assert Parts().block_forward.owner == "yours"


# The picture and the page --------------------------------------------------------------------------------------------


def test_the_picture_has_every_part():
    own = {number: exercises.find(number).reference for number in IDS[::2]}
    parts = Parts(own=own)
    figure = portrait.draw(parts, minids.ModelConfig(**TINY))
    texts = [text.get_text() for text in figure.axes[0].texts]
    for part in parts.all.values():
        mark = "✓ " if part.owner == "yours" else ""
        assert mark + part.exercise.title in texts
    assert "2 layers: 1 dense,\n1 with experts" in texts
    assert plots.png(figure)


def test_rows_say_whose_and_how_often():
    _, ours, tokens = pair("experts in groups", Parts(own={"01.1": exercises.find("01.1").reference}))
    everything(ours, tokens)
    rows = {row[0]: row for row in portrait.rows(ours.parts)}
    assert len(rows) == len(IDS)
    assert rows["01.1 rms_norm"][2] == "yours" and int(rows["01.1 rms_norm"][3]) == ours.parts.rms_norm.calls["yours"]
    assert rows["12.1 fprop"][2:5] == ("reference", "0", "")
    assert {row[2] for row in portrait.kernels()} == {"reference"}
    progress.update(lambda p: p.passed.update({"06.4": {"name": "decode_block_kernel"}}))
    assert [row[0] for row in portrait.kernels() if row[2] == "yours"] == ["06.4 decode_block_kernel"]


def test_the_page_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    figure = plots.figure()[0]
    portrait.write_page(path, "Mine <1>", [("A", figure), ("B", "x < y"), ("C", [("a", "yours"), ("b", "reference")])])
    text = path.read_text(encoding="utf-8")
    assert "<title>Mine &lt;1&gt;</title>" in text and "data:image/png;base64," in text and "x &lt; y" in text
    assert text.count('<tr class="yours">') == 1 and text.count("<tr>") == 1
    assert "http" not in text  # it needs nothing else
    monkeypatch.setattr("minids.files.sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        portrait.write_page(path, "Other", [])
    assert path.read_text(encoding="utf-8") == text and len(list(path.parent.iterdir())) == 1
