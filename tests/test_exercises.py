"""Every exercise of every lesson: its reference and its solution pass; what is wrong is found out, and told why."""

import ast
import copy
import linecache
import math
import time

import pytest
import torch

from minids import triton_env
from minids.lab import exercises, solution
from minids.lab.exercise import REGISTRY, cases, is_float, leaves
from minids.lab.judge import FAIL, PASS, judge
from minids.lab.observe import expected, same_values

EXERCISES = [exercise for lesson in exercises.by_lesson().values() for exercise in lesson]
SECONDS = 5


def marks(exercise):
    """Kernels are tried where their accesses and bytes are counted."""
    counts = exercise.kernel is None or triton_env.mode() == "interpreter"
    return [] if counts else pytest.mark.skip("kernels are counted in Triton's interpreter alone: TRITON_INTERPRET=1")


each_exercise = pytest.mark.parametrize(
    "exercise", [pytest.param(e, id=e.title.replace(" ", "_"), marks=marks(e)) for e in EXERCISES]
)
each_wrong = pytest.mark.parametrize(
    "exercise, wrong",
    [pytest.param(e, w, id=f"{e.id}_{w.name}", marks=marks(e)) for e in EXERCISES for w in e.wrongs],
)


def has_floats(exercise):
    """Whether a case has floating tensors with more than one number."""
    return any(is_float(leaf) and leaf.dim() for leaf in leaves(cases(exercise)[0].args))


def has_gaps(exercise):
    """Whether its arguments can be spread in memory: a kernel's are by rows, so they need two dimensions."""
    least = 1 if exercise.kernel is None else 2
    return any(is_float(leaf) and leaf.dim() >= least for leaf in leaves(cases(exercise)[0].args))


def judged(exercise, answer):
    """The Outcome of an answer; of a function where a kernel is asked for: as if a kernel had given its result."""
    if exercise.kernel is None or hasattr(answer, "arg_names"):
        return judge(exercise, answer)
    faked = copy.copy(exercise)
    faked.launch = lambda kernel, *args: answer(*args) if kernel is exercise.kernel else exercise.launch(kernel, *args)
    return judge(faked, exercise.kernel)


def changed(value, change):
    """`value` with change(part) in the place of each tensor and number of the result."""
    if isinstance(value, dict):
        return {key: changed(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(value)


def of(exercise, change):
    """The answer that is the reference's result, changed."""
    return lambda *args: changed(exercise.reference(*args), change)


def where(exercise, holds, change):
    """The answer that is right in the cases for which holds(case), and changed in the others."""
    tried = cases(exercise)

    def answer(*args):
        case = next(c for c in tried if same_arguments(args, c.args))
        value = exercise.reference(*args)
        return value if holds(case) else changed(value, change)

    return answer


def same_arguments(args, others):
    tensors = [isinstance(a, torch.Tensor | list | tuple | dict) for a in args]
    return all(same_values(a, b) if t else a == b for a, b, t in zip(args, others, tensors, strict=True))


def shifted(part):
    """A part of a result, wrong by something that is no factor."""
    if isinstance(part, torch.Tensor):
        if part.dtype == torch.bool:
            return ~part
        first = torch.arange(part.numel()).view(part.shape) == 0
        return torch.where(first, part + part.abs().max() + 1, part)
    return part + 1 if isinstance(part, int | float) else part


def scaled(factor):
    def scale(part):
        return part * factor if isinstance(part, torch.Tensor) or type(part) in (int, float) else part

    return scale


def zero(part):
    return torch.zeros_like(part) if isinstance(part, torch.Tensor) else type(part)(0)


def assert_rejected(exercise, answer, sentence=None):
    """The answer fails; where no known wrong answer does the same, its diagnosis begins with `sentence`."""
    outcome = judged(exercise, answer)
    assert outcome.verdict == FAIL
    known = [wrong.why for wrong in exercise.wrongs]
    if sentence is not None and outcome.diagnosis not in known:
        assert outcome.diagnosis.startswith(sentence), outcome.diagnosis


def assert_split(exercise, holds, sentence):
    """An answer that is right only in the cases for which holds(case) fails with `sentence`."""
    if len({holds(case) for case in cases(exercise)}) == 2:
        assert_rejected(exercise, where(exercise, holds, shifted), sentence)


# What is right -------------------------------------------------------------------------------------------------------


@each_exercise
def test_the_reference_passes_in_time(exercise):
    began = time.process_time()
    outcome = judge(exercise, exercise.reference if exercise.kernel is None else exercise.kernel)
    assert outcome.verdict == PASS, outcome
    assert time.process_time() - began < SECONDS


def lesson_scope(exercise):
    """What stands before an exercise's solution in its lesson: imports, functions, constants, earlier references."""
    scope = {"__name__": "lesson"}
    path = next(solution.SOLUTIONS.glob(f"{exercise.lesson}_*.py"), None)
    if path is None:
        pytest.skip(f"solutions/{exercise.lesson}_*.py is not written yet; test_lessons.py says so")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        call = getattr(node, "value", None)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
            exec(compile(ast.Module([node], []), path.name, "exec"), scope)
        elif isinstance(node, ast.Assign) and isinstance(call, ast.Call) and ast.unparse(call.func) == "check":
            found = exercises.find(ast.unparse(call.args[0]))
            scope[ast.unparse(node.targets[0])] = found.reference if found.kernel is None else found.kernel
    return scope


@each_exercise
def test_the_solution_passes(exercise):
    text, scope = solution.of(exercise), lesson_scope(exercise)
    assert "SOLUTION" not in text and text.lstrip().startswith(("def ", "@"))
    linecache.cache[exercise.title] = (len(text), None, text.splitlines(keepends=True), exercise.title)
    exec(compile(text, exercise.title, "exec"), scope)  # Triton reads the source of a kernel
    outcome = judge(exercise, scope[exercise.name])
    assert outcome.verdict == PASS, outcome


@each_exercise
def test_it_has_hints_and_a_stub_s_names(exercise):
    assert len(exercise.hints) == 2 and all(len(hint) > 20 for hint in exercise.hints)
    assert exercise.minutes > 0 and exercise.name.isidentifier()
    (solved,) = ast.parse(solution.of(exercise)).body
    names = [argument.arg for argument in solved.args.args]
    assert names == (exercise.kernel.arg_names if exercise.kernel else exercise.parameters[: len(names)])


@each_exercise
def test_its_cases_are_awkward(exercise):
    tried = cases(exercise)
    assert len(tried) >= 3
    whole = [size for case in tried for name, size in case.sizes.items() if name != "B" and isinstance(size, int)]
    assert not whole or {case.aligned for case in tried} == {True, False}
    assert "B" not in exercise.sizes[0] or {case.batch == 1 for case in tried} == {True, False}
    assert {case.strided for case in tried} == ({True, False} if has_gaps(exercise) else {False})
    assert any(leaf.dim() and not leaf.is_contiguous() for c in tried for leaf in leaves(c.args) if is_float(leaf)) == (
        has_gaps(exercise)
    )
    assert len({case.label for case in tried}) == len(tried)


@each_exercise
def test_inputs_depend_on_nothing_else(exercise):
    torch.manual_seed(1)
    one = cases(exercise)
    torch.manual_seed(2)
    assert all(same_values(a.args, b.args) for a, b in zip(one, cases(exercise), strict=True))


@each_exercise
def test_gradients_are_compared_where_there_are_any(exercise):
    gradients = expected(exercise, cases(exercise)[0])[1]
    if exercise.gradients:
        assert isinstance(gradients, dict)
        assert exercise.constant == tuple(name for name, g in gradients.items() if not g.any())
    else:
        assert gradients is None


@each_exercise
def test_a_kernel_has_its_fewest_bytes(exercise):
    if exercise.kernel is not None and exercise.traffic is not None:
        for case in cases(exercise):
            read = sum(leaf.nbytes for leaf in leaves(case.args) if isinstance(leaf, torch.Tensor))
            assert exercise.traffic(*case.args) > read, "a kernel reads its arguments and writes its result"


def test_ids_are_a_lesson_and_a_number():
    for exercise in REGISTRY.values():
        lesson, number = exercise.id.split(".")
        assert len(lesson) == 2 and int(lesson) >= 0 and number == str(int(number))
    for lesson, inside in exercises.by_lesson().items():
        ids = [e.id for e in inside]
        wanted = [f"{lesson}.{n}" for n in range(1, len(inside) + 1)]
        assert sorted(ids) == sorted(wanted), f"lesson {lesson} has {ids}; number them {wanted}"


# What is wrong -------------------------------------------------------------------------------------------------------


@each_exercise
def test_there_are_three_known_wrong_answers(exercise):
    sentences = {wrong.why for wrong in exercise.wrongs}
    alike = len(exercise.wrongs) - len(sentences)
    assert not alike, f"{exercise.title}: {alike} wrong answers have the sentence of another; each needs its own"
    assert len(sentences) >= 3, f"{exercise.title} has {len(sentences)} wrong answers; add others until they are 3"


@each_wrong
def test_a_known_wrong_answer_gets_its_own_sentence(exercise, wrong):
    outcome = judged(exercise, wrong.fn)
    assert (outcome.verdict, outcome.diagnosis) == (FAIL, wrong.why), outcome


@each_exercise
def test_zeros_fail(exercise):
    assert_rejected(exercise, of(exercise, zero), "It returns zeros")


@each_exercise
def test_an_argument_returned_as_it_is_fails(exercise):
    args = cases(exercise)[0].args
    for position, name in enumerate(exercise.parameters[: len(args)]):
        assert_rejected(exercise, lambda *args, at=position: args[at], f"It returns its argument {name} as it is")


@each_exercise
@pytest.mark.parametrize("factor", [1.1, 2])
def test_a_constant_factor_fails(exercise, factor):
    parts = leaves(exercise.reference(*cases(exercise)[0].args))
    numbers = all(type(part) in (int, float) or is_float(part) for part in parts)
    if factor == 2 or all(type(part) is float or is_float(part) for part in parts):
        sentence = f"Everything is {factor} times what it should be" if numbers else None
        assert_rejected(exercise, of(exercise, scaled(factor)), sentence)


@each_exercise
def test_right_for_multiples_of_8_only_fails(exercise):
    assert_split(exercise, lambda case: case.aligned, "It is right only for sizes that are multiples of 8")


@each_exercise
def test_right_for_batch_1_only_fails(exercise):
    assert_split(exercise, lambda case: case.batch == 1, "It is right for batch 1 only")


@each_exercise
def test_right_for_contiguous_inputs_only_fails(exercise):
    assert_split(exercise, lambda case: not case.strided, "It is right for contiguous inputs only")


@each_exercise
def test_right_values_in_another_dtype_fail(exercise):
    def half(part):
        return part.bfloat16() if is_float(part) else part

    if any(map(is_float, leaves(exercise.reference(*cases(exercise)[0].args)))):
        assert_rejected(exercise, of(exercise, half), "")


@each_exercise
def test_a_result_without_its_gradient_fails(exercise):
    if exercise.gradients:
        detached = of(exercise, lambda part: part.detach() if is_float(part) else part)
        assert_rejected(exercise, detached, "The values are right, the gradients are not")


@each_exercise
def test_an_argument_changed_in_place_fails(exercise):
    if not has_floats(exercise):
        return
    first = next(n for n, a in zip(exercise.parameters, cases(exercise)[0].args, strict=False) if is_float(a))

    def answer(*args):
        value = exercise.reference(*args)
        next(filter(is_float, args)).add_(1)
        return value

    sentence = f"It changes its argument {first} in place" if exercise.kernel is None else f"It writes into {first}"
    assert_rejected(exercise, answer, sentence)


@each_exercise
def test_nan_and_memory_that_was_never_written_fail(exercise):
    floats = [leaf for leaf in leaves(exercise.reference(*cases(exercise)[0].args)) if is_float(leaf) and leaf.dim()]
    if floats:
        empty = of(exercise, lambda part: torch.empty_like(part) if is_float(part) else part)
        assert_rejected(exercise, empty, "The result holds NaN")
    assert_rejected(exercise, of(exercise, lambda part: math.nan if isinstance(part, float) else shifted(part)))
