"""Lesson 10: the 256 numbers of E4M3, rounding to them, scales that are powers of 2, tiles and blocks."""

import torch
import torch.nn.functional as F

from minids.fp8 import reference
from minids.lab.exercise import Exercise

NAN, SMALLEST = float("nan"), 2.0**-126

# 10.1 ----------------------------------------------------------------------------------------------------------------

DECODE_E4M3 = Exercise(
    "10.1",
    reference.decode_e4m3,
    minutes=8,
    sizes=[
        {"rows": 8, "columns": 32},
        {"rows": 3, "columns": 13},
        {"rows": 1, "columns": 7},
    ],
    tolerance=0.01,  # of float32's: 4e-5 beside 448, where the smallest number is 2e-3
    hints=[
        "Take the three fields out first, as whole numbers: sign = codes >> 7, e = codes >> 3 & 15, m = codes & 7, of "
        "codes.int(). Which of the three kinds of numbers (normal, subnormal, NaN) does e decide, and which m?",
        "normal = (1 + m / 8) * 2.0 ** (e - 7); subnormal = m / 8 * 2.0 ** -6. torch.where(e == 0, subnormal, normal) "
        "chooses, times (1 - 2 * sign); a second torch.where puts NaN where e is 15 and m is 7.",
    ],
)


@DECODE_E4M3.inputs
def _(r, rows, columns):
    if rows * columns == 256:
        return r.permutation(256).view(rows, columns).to(torch.uint8)
    return r.integers(0, 256, rows, columns).to(torch.uint8)


def value_of(codes, bias=7, lowest=-6, fraction=8, nan=None):
    """E4M3's value of codes, each part of the rule open to a mistake."""
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = sign * torch.where(e == 0, m / fraction * 2.0**lowest, (1 + m / fraction) * 2.0 ** (e - bias))
    return torch.where((e == 15) & (m == 7) if nan is None else nan(codes, e, m), NAN, value)


@DECODE_E4M3.wrong("Your bias is 8: with 4 bits of exponent it is 7, so that e = 7 means 2^0 = 1.")
def bias_of_8(codes):
    return value_of(codes, bias=8)


@DECODE_E4M3.wrong("Your bias is 15, that of 5 exponent bits (E5M2, float16): E4M3 has 4, and its bias is 7.")
def bias_of_15(codes):
    return value_of(codes, bias=15)


@DECODE_E4M3.wrong(
    "The bias is missing: the exponent field counts from 0, and e - 7 is the power, or there would be nothing below 1."
)
def no_bias(codes):
    return value_of(codes, bias=0)


@DECODE_E4M3.wrong(
    "The subnormals are forgotten: with e = 0 there is no leading 1, the value is 2^-6 · m/8. As it is, no code means 0."
)
def leading_one_always(codes):
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    return torch.where((e == 15) & (m == 7), NAN, sign * (1 + m / 8) * 2.0 ** (e - 7))


@DECODE_E4M3.wrong(
    "Your subnormals have the power 2^-7: it is 2^-6, the same as for e = 1, so that the step stays the same from 7/8 "
    "· 2^-6 up to 2^-6."
)
def subnormals_at_7(codes):
    return value_of(codes, lowest=-7)


@DECODE_E4M3.wrong("Your subnormals are all 0: with e = 0 the value is 2^-6 · m/8, which is 0 for m = 0 alone.")
def subnormals_flushed(codes):
    return torch.where((codes.int() >> 3 & 15) == 0, 0.0, value_of(codes))


@DECODE_E4M3.wrong("The codes with e = 15 and m = 7 are not 480: they are NaN, one for each sign.")
def nan_is_480(codes):
    return value_of(codes, nan=lambda codes, e, m: e < 0)


@DECODE_E4M3.wrong(
    "You make everything with e = 15 special, as float16 and float32 do. In E4M3 only m = 7 is NaN there; the other seven "
    "are the numbers 256 to 448."
)
def top_exponent_reserved(codes):
    return value_of(codes, nan=lambda codes, e, m: e == 15)


@DECODE_E4M3.wrong("E4M3 has no infinity: e = 15 with m = 0 is 256, and only m = 7 is NaN.")
def with_infinity(codes):
    value = value_of(codes)
    return torch.where((codes.int() & 127) == 120, value.sign() * float("inf"), value)


@DECODE_E4M3.wrong("Only code 127 is NaN with you: 255, the same with the sign bit, is NaN too.")
def one_nan(codes):
    return value_of(codes, nan=lambda codes, e, m: codes == 127)


@DECODE_E4M3.wrong(
    "You read negative codes as two's complement, like whole numbers. A float has a sign bit: the other seven bits mean the "
    "same as without it."
)
def twos_complement(codes):
    wide = codes.int()
    return torch.where(wide < 128, value_of(wide), -value_of((256 - wide).clamp_max(127)))


@DECODE_E4M3.wrong("The sign bit is forgotten: from code 128 on the numbers are negative.")
def no_sign(codes):
    return value_of(codes.int() & 127)


@DECODE_E4M3.wrong(
    "The sign bit is still in your exponent, which comes out 16 too large for negative numbers: after >> 3 keep four bits, "
    "& 15."
)
def sign_in_exponent(codes):
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3, codes & 7
    value = sign * torch.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))
    return torch.where((e == 15) & (m == 7), NAN, value)


@DECODE_E4M3.wrong("You divide the mantissa by 16: three bits count from 0 to 7, in eighths.")
def sixteenths(codes):
    return value_of(codes, fraction=16)


@DECODE_E4M3.wrong(
    "You divide the mantissa by 7: its 8 values are eighths, 0/8 to 7/8; 8/8 would be the next power of 2."
)
def sevenths(codes):
    return value_of(codes, fraction=7)


@DECODE_E4M3.wrong("Those are the fields of E5M2: here the exponent has 4 bits (codes >> 3 & 15), the mantissa 3.")
def e5m2(codes):
    return codes.view(torch.float8_e5m2).float()


@DECODE_E4M3.wrong("uint8 cannot go below 0: 1 - 2 comes out as 255, and 3 - 7 as 252. Begin with codes = codes.int().")
def wraps_around(codes):
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = sign * torch.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))
    return torch.where((e == 15) & (m == 7), NAN, value)


@DECODE_E4M3.wrong(
    "A cast, .to(torch.float8_e4m3fn), rounds the whole NUMBER 77 to the nearest of E4M3. The byte 77 itself is to be read: "
    "take its bits, or codes.view(torch.float8_e4m3fn)."
)
def cast(codes):
    return codes.to(torch.float8_e4m3fn).float()


@DECODE_E4M3.wrong("2 ** n of whole numbers stays whole, and 2 ** -1 is 0: write 2.0 ** (e - 7).")
def whole_powers(codes):
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = sign * torch.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2 ** (e - 7))
    return torch.where((e == 15) & (m == 7), NAN, value)


@DECODE_E4M3.wrong("m // 8 is 0 for every m: divide by /, the mantissa counts eighths.")
def mantissa_cut(codes):
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = sign * torch.where(e == 0, m // 8 * 2.0**-6, (1 + m // 8) * 2.0 ** (e - 7))
    return torch.where((e == 15) & (m == 7), NAN, value)


@DECODE_E4M3.wrong("NaN needs BOTH, e = 15 and m = 7: & and not |.")
def nan_of_either(codes):
    return value_of(codes, nan=lambda codes, e, m: (e == 15) | (m == 7))


@DECODE_E4M3.wrong("For e = 0 your numbers still have the leading 1: there the value is 2^-6 · m/8, which begins at 0.")
def leading_one_below(codes):
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = sign * (1 + m / 8) * 2.0 ** (e.clamp_min(1) - 7)
    return torch.where((e == 15) & (m == 7), NAN, value)


@DECODE_E4M3.wrong("That is the number of the byte, or its cast: take the fields of its bits apart.")
def numbers_of_the_bytes(codes):
    return codes.float()


@DECODE_E4M3.wrong("NaN becomes infinity with you: E4M3 has none.")
def infinity_for_nan(codes):
    return reference.decode_e4m3(codes).nan_to_num(float("inf"))


# 10.2 ----------------------------------------------------------------------------------------------------------------

ROUND_TO_E4M3 = Exercise(
    "10.2",
    reference.round_to_e4m3,
    minutes=12,
    sizes=[
        {"rows": 8, "columns": 64},
        {"rows": 5, "columns": 77},
        {"rows": 1, "columns": 51},
    ],
    tolerance=0.01,  # as above
    hints=[
        "Find the step between neighbours around each x first: it is 1/8 of the power of 2 below |x|. Dividing by it makes "
        "rounding to E4M3 a rounding to whole numbers. Where does the step stop shrinking, where do the numbers end?",
        "exponent = torch.frexp(x).exponent - 1, at least -6; step = 2.0 ** (exponent - 3); torch.round(x / step) * step "
        "rounds ties to even. Then clamp to ±448, and torch.where(x.isfinite(), ..., nan).",
    ],
)


@ROUND_TO_E4M3.inputs
def _(r, rows, columns):
    x = r.normal(rows * columns) * 2 ** r.uniform(-12, 8, rows * columns)
    ties = [17, 19, 21, -17, -19, -23, 1.0625, 1.1875, -1.0625, -1.1875, 2.0**-10, 3 * 2.0**-10, -5 * 2.0**-10, 464]
    edges = [0, 448, -448, 449, 480, -500, 1e6, -1e5, 2.0**-6, 0.9 * 2.0**-6, 2.0**-9, 0.3 * 2.0**-9, 1e-30, 0.99]
    special = torch.tensor([*ties, *edges, NAN, float("inf"), float("-inf")], dtype=torch.float64)
    x[: len(special)] = special
    return x[r.permutation(rows * columns)].view(rows, columns)


def step_of(x, bits=3, lowest=-6, shift=1):
    """The step between neighbours with so many mantissa bits around each of x, each part open to a mistake."""
    exponent = (torch.frexp(x).exponent - shift).clamp_min(lowest)
    return torch.ldexp(torch.ones_like(x), exponent - bits)


def rounded(x, turn=torch.round, **parts):
    """x rounded to its step, unclamped."""
    step = step_of(x, **parts)
    return turn(x / step) * step


def ended(x, value):
    """A rounded value of x, brought to an end at 448, with NaN where it must be."""
    return torch.where(x.isfinite(), value.clamp(-448, 448), NAN)


@ROUND_TO_E4M3.wrong(
    "You cut off instead of rounding: 0.99 is nearer to 1 than to 0.9375. Use torch.round, which takes the nearest."
)
def truncated(x):
    return ended(x, rounded(x, turn=torch.trunc))


@ROUND_TO_E4M3.wrong("You always round down, towards minus infinity: take the nearest number (torch.round).")
def floored(x):
    return ended(x, rounded(x, turn=torch.floor))


@ROUND_TO_E4M3.wrong(
    "Numbers halfway between two go away from zero: 17 lies between 16 and 18, and 16 has the even mantissa. torch.round "
    "does that."
)
def ties_away(x):
    return ended(x, rounded(x, turn=lambda y: y.sign() * (y.abs() + 0.5).floor()))


@ROUND_TO_E4M3.wrong(
    "floor(x + 0.5) sends everything halfway upwards: of two equally near numbers take the one with the even mantissa, as "
    "torch.round does."
)
def half_up(x):
    return ended(x, rounded(x, turn=lambda y: (y + 0.5).floor()))


@ROUND_TO_E4M3.wrong(
    "Of two equally near numbers you always take the smaller (argmin does so in a sorted list): take the one with the even "
    "mantissa, as torch.round does."
)
def half_down(x):
    return ended(x, rounded(x, turn=lambda y: (y - 0.5).ceil()))


@ROUND_TO_E4M3.wrong(
    "Your step ends at 2^-6. It is the exponent that ends at -6; the step there is an eighth of 2^-6, which is 2^-9."
)
def step_ends_at_6(x):
    step = (2.0 ** (torch.frexp(x).exponent - 4)).clamp_min(2.0**-6)
    return ended(x, (x / step).round() * step)


@ROUND_TO_E4M3.wrong(
    "From 464 on you give NaN, as torch's cast did before version 2.12. Here finite numbers saturate: clamp to ±448."
)
def nan_from_464(x):
    value = rounded(x)
    return torch.where(x.abs() <= 464, value.clamp(-448, 448), NAN)


@ROUND_TO_E4M3.wrong("Beyond 448 you give NaN: finite numbers saturate here, at 448 and -448.")
def saturates_to_nan(x):
    return torch.where(x.abs() <= 448, rounded(x), NAN)


@ROUND_TO_E4M3.wrong("Nothing ends at 448: 480, 512 and so on are no numbers of E4M3. Clamp to ±448.")
def no_end(x):
    return torch.where(x.isfinite(), rounded(x), NAN)


@ROUND_TO_E4M3.wrong("You clamp at 480: that code is NaN, the largest number is 448.")
def ends_at_480(x):
    return torch.where(x.isfinite(), rounded(x).clamp(-480, 480), NAN)


@ROUND_TO_E4M3.wrong("You clamp at 240, the largest of another E4M3, which keeps e = 15 for infinity. Here it is 448.")
def ends_at_240(x):
    return torch.where(x.isfinite(), rounded(x).clamp(-240, 240), NAN)


@ROUND_TO_E4M3.wrong(
    "Numbers below 2^-6 become 0: the subnormals are missing. There the step stays 2^-9, so clamp the exponent at -6."
)
def flushed(x):
    return torch.where(x.abs() < 2.0**-6, 0.0, ended(x, rounded(x)))


@ROUND_TO_E4M3.wrong(
    "The step goes on shrinking below 2^-6, as if there were more exponents. It stays 2^-9 there: clamp the exponent at -6."
)
def no_lowest(x):
    return ended(x, rounded(x, lowest=-200))


@ROUND_TO_E4M3.wrong("The subnormals' step is half of what it is: the exponent ends at -6, not at -7.")
def lowest_at_7(x):
    return ended(x, rounded(x, lowest=-7))


@ROUND_TO_E4M3.wrong(
    "torch.frexp gives a mantissa from 0.5 to 1, so its exponent is one more than that of the leading bit: take 1 off."
)
def frexp_as_it_is(x):
    return ended(x, rounded(x, shift=0))


@ROUND_TO_E4M3.wrong("Your step is twice too large: three bits of mantissa cut each power of 2 into 8 steps, not 4.")
def two_bits(x):
    return ended(x, rounded(x, bits=2))


@ROUND_TO_E4M3.wrong(
    "Your step is half of what it is: three bits of mantissa cut each power of 2 into 8 steps, not 16."
)
def four_bits(x):
    return ended(x, rounded(x, bits=4))


@ROUND_TO_E4M3.wrong(
    "Infinity becomes 448 with you (clamp does that, and torch's cast since version 2.12): it must give NaN, or nobody sees "
    "that something broke."
)
def infinity_is_448(x):
    return rounded(x.clamp(-1e38, 1e38)).clamp(-448, 448)


@ROUND_TO_E4M3.wrong("NaN becomes 0 with you: it must stay NaN, or a broken number goes on unseen.")
def nan_is_zero(x):
    return torch.where(x.isnan(), 0.0, ended(x, rounded(x)))


@ROUND_TO_E4M3.wrong(
    "Adding half a step to the bits sends ties away from zero: add 0x7FFFF plus the last bit that stays, (bits >> 20) & 1, so that "
    "ties go to the even one."
)
def half_added_to_the_bits(x):
    moved = x.contiguous().view(torch.int32) + 0x80000 & ~0xFFFFF
    return ended(x, torch.where(x.abs() < 2.0**-6, torch.round(x * 512) / 512, moved.view(torch.float32)))


@ROUND_TO_E4M3.wrong("Those are numbers of E5M2, with two bits of mantissa: E4M3 is torch.float8_e4m3fn.")
def of_e5m2(x):
    return x.to(torch.float8_e5m2).float()


@ROUND_TO_E4M3.wrong("Those are numbers of E5M2, clamped: E4M3 has three bits of mantissa, torch.float8_e4m3fn.")
def of_e5m2_clamped(x):
    return ended(x, x.clamp(-448, 448).to(torch.float8_e5m2).float())


@ROUND_TO_E4M3.wrong("Infinity stays infinity with you: it must give NaN, as E4M3 has none.")
def infinity_stays(x):
    return torch.where(x.isinf(), x, reference.round_to_e4m3(x))


@ROUND_TO_E4M3.wrong("A negative number has no logarithm: take x.abs() first.")
def log_without_abs(x):
    step = 2.0 ** (x.log2().floor().clamp_min(-6) - 3)
    return ended(x, (x / step).round() * step)


@ROUND_TO_E4M3.wrong(
    "The exponent is rounded to the NEAREST whole number: it must be rounded down, log2(|x|).floor(), for 1.9 · 2^k has the step "
    "of 2^k too."
)
def log_rounded(x):
    step = 2.0 ** (x.abs().log2().round().clamp_min(-6) - 3)
    return ended(x, (x / step).round() * step)


@ROUND_TO_E4M3.wrong("After rounding x / step nothing brings it back: multiply by step.")
def not_brought_back(x):
    return ended(x, (x / step_of(x)).round())


@ROUND_TO_E4M3.wrong("You multiply by the step and divide afterwards: x / step counts the steps, and is rounded.")
def step_upside_down(x):
    return ended(x, (x * step_of(x)).round() / step_of(x))


@ROUND_TO_E4M3.wrong(
    "One step serves all numbers, that of the largest or a fixed one: each number has the step of its exponent."
)
def whole_steps(x):
    return ended(x, x.round())


@ROUND_TO_E4M3.wrong(
    "Numbers are rounded twice, first to bfloat16: what that makes a tie goes the wrong way. Stay in float32."
)
def through_bfloat16(x):
    return reference.round_to_e4m3(x.bfloat16().float())


@ROUND_TO_E4M3.wrong("Only numbers above 448 are held there: those below -448 must stop at -448.")
def one_end(x):
    return torch.where(x.isfinite(), rounded(x).clamp_max(448.0), NAN)


# 10.3 ----------------------------------------------------------------------------------------------------------------

POWER_OF_TWO_SCALE = Exercise(
    "10.3",
    reference.power_of_two_scale,
    minutes=6,
    sizes=[
        {"rows": 8, "columns": 8, "about": "2^-9"},
        {"rows": 3, "columns": 7, "about": "2^0"},
        {"rows": 1, "columns": 13, "about": "2^-90"},
        {"rows": 2, "columns": 9, "about": "2^60"},
    ],
    hints=[
        "Which power of 2 is at least s: the exponent rounded down, to the nearest, or up? And what if s is a power already?",
        "2^ceil(log2 s); in float32 log2 cannot tell 2^60 from the next number, so convert first: scale.double().log2()"
        ".ceil().exp2().float(). Or torch.frexp(scale): the mantissa is 0.5 for an exact power.",
    ],
)


@POWER_OF_TWO_SCALE.inputs
def _(r, rows, columns, about):
    exponent = int(about.split("^")[1])
    scale = 2 ** (exponent + r.uniform(-4, 4, rows * columns))
    scale[:3] = 2.0**exponent * torch.tensor([1, 0.25, 1 + 2.0**-23], dtype=torch.float64)
    scale[3:6] = 2.0**exponent * torch.tensor([2 + 2.0**-22, 1 - 2.0**-24, NAN], dtype=torch.float64)
    return scale[r.permutation(rows * columns)].view(rows, columns)


def power(scale, turn):
    """2 to the exponent that turn(log2 scale) gives, computed in float64."""
    return turn(scale.double().log2()).exp2().float()


@POWER_OF_TWO_SCALE.wrong(
    "You round the exponent down: the scale shrinks, and the largest number of the tile lands beyond 448. Round up."
)
def down(scale):
    return power(scale, torch.floor)


@POWER_OF_TWO_SCALE.wrong(
    "You round to the nearest power: where that is the smaller one, the largest number lands beyond 448. Round up."
)
def nearest(scale):
    return power(scale, torch.round)


@POWER_OF_TWO_SCALE.wrong(
    "An exact power of 2 is doubled: it is a power already, and stays. (frexp gives it the mantissa 0.5.)"
)
def powers_doubled(scale):
    return power(scale, lambda exponent: exponent.floor() + 1)


@POWER_OF_TWO_SCALE.wrong(
    "log2 in float32 rounds: of a number just above 2^60 it gives 60 exactly, and the power comes out too small. Take "
    "torch.frexp, or log2 of scale.double()."
)
def log_in_float32(scale):
    return scale.log2().ceil().double().exp2().float()


@POWER_OF_TWO_SCALE.wrong("That is the exponent: the scale itself is asked for, 2 to that power.")
def exponent_alone(scale):
    return scale.double().log2().ceil().float()


@POWER_OF_TWO_SCALE.wrong("You round the scale up to a whole number: round its EXPONENT up, 2^ceil(log2 s).")
def whole_number(scale):
    return scale.ceil()


@POWER_OF_TWO_SCALE.wrong(
    "NaN has become a number: frexp gives some exponent for it. A scale that is NaN must stay NaN (torch.where)."
)
def nan_made_finite(scale):
    return torch.where(scale.isnan(), 1.0, power(scale, torch.ceil))


@POWER_OF_TWO_SCALE.wrong(
    "Twice too large: frexp's mantissa lies between 0.5 and 1, so its exponent is rounded up already."
)
def doubled(scale):
    return 2 * power(scale, torch.ceil)


@POWER_OF_TWO_SCALE.wrong(
    "2 ** frexp's exponent needs two repairs: an exact power of 2 (mantissa 0.5) comes out doubled, and NaN gets a number."
)
def frexp_alone(scale):
    return 2.0 ** torch.frexp(scale).exponent


@POWER_OF_TWO_SCALE.wrong("A cast to float8_e8m0fnu does not round UP: bring the exponent up first.")
def cast_to_e8m0(scale):
    return scale.to(torch.float8_e8m0fnu).float()


@POWER_OF_TWO_SCALE.wrong("That is a power of e, by log and exp: log2 and 2.0 ** are those of 2.")
def power_of_e(scale):
    return scale.double().log().ceil().exp().float()


@POWER_OF_TWO_SCALE.wrong("That is the square of the exponent, n ** 2: 2 to that power is asked for, 2.0 ** n.")
def square(scale):
    return scale.double().log2().ceil().square().float()


@POWER_OF_TWO_SCALE.wrong("trunc rounds towards 0: a scale above 1 is rounded down with you. ceil always rounds up.")
def cut_towards_zero(scale):
    return scale.double().log2().trunc().exp2().float()


@POWER_OF_TWO_SCALE.wrong("All scales get one power, that of the largest: each scale has its own.")
def one_power(scale):
    return torch.full_like(scale, scale.nan_to_num(0.0).max().double().log2().ceil().exp2().item())


# 10.4 ----------------------------------------------------------------------------------------------------------------

QUANTIZE_TILES = Exercise(
    "10.4",
    reference.quantize_tiles,
    minutes=12,
    sizes=[
        {"B": 1, "T": 8, "K": 384, "scales": "any"},
        {"B": 3, "T": 5, "K": 300, "scales": "any"},
        {"B": 2, "T": 3, "K": 200, "scales": "powers of 2"},
        {"B": 1, "T": 7, "K": 256, "scales": "any", "holds": "a tile of zeros"},
        {"B": 3, "T": 1, "K": 130, "scales": "powers of 2", "holds": "a NaN"},
        {"B": 1, "T": 4, "K": 257, "scales": "any", "holds": "tiny numbers"},
        {"B": 2, "T": 2, "K": 50, "scales": "any"},
        {"B": 1, "T": 2, "K": 128, "scales": "powers of 2", "holds": "zeros alone"},
    ],
    dtypes=(torch.float32, torch.bfloat16),
    hints=[
        "Make the tiles an axis of their own: [..., K] becomes [..., tiles, 128]. Then the largest magnitude of a tile is "
        "one amax over the last axis. What can stand in the last tile, where K is no multiple of 128, without changing it?",
        "tiles = F.pad(x.float(), (0, -K % 128)).unflatten(-1, (-1, 128)); scale = (tiles.abs().amax(-1) / 448).clamp_min("
        "2.0**-126), a power of 2 on demand. Divide by scale[..., None], round, flatten(-2), cut to K, cast.",
    ],
)


def numbers(r, *shape):
    """Normal numbers [...,n,m] of bfloat16 with the largest magnitude of each [n,m] in its corner.

    Times 448 / amax none of them lies exactly between two numbers of E4M3: the mantissas of the largest, 153/32 to
    207/32, are no multiples of 7 as 448 is, and their triples need a bit more than bfloat16 has. So x / scale, x * (1 /
    scale) and x * (448 / amax) give the same codes, and whoever computes in another of these ways is right.
    """
    x = r.normal(*shape).clamp(-4.5, 4.5)
    largest = torch.tensor([153, 163, 177, 207, -153, -163, -177, -207], dtype=torch.float64) / 32
    x[..., 0, 0] = largest[r.integers(0, 8, *shape[:-2])]
    return (x * 2.0 ** r.integers(-3, 4, *shape[:-2], 1, 1)).bfloat16().double()


@QUANTIZE_TILES.inputs
def _(r, B, T, K, scales, holds=""):
    x = numbers(r, B, T, -(-K // 128), 1, 128).flatten(-3)[..., :K].clone()
    if holds == "a tile of zeros":
        x[0, 2, :128] = 0
    if holds == "zeros alone":
        x[:] = 0  # a scale of 2^-126 is compared with nothing larger
    if holds == "a NaN":
        x[1, 0, 5] = NAN
    if holds == "tiny numbers":
        x = x * 2.0**-20  # as gradients are
    return x, scales == "powers of 2"


def as_tiles(x):
    return F.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))


def scale_by(amax, power_of_2=False, largest=448.0):
    scale = (amax / largest).clamp_min(SMALLEST)
    return reference.power_of_two_scale(scale) if power_of_2 else scale


def coded(x, tiles, scale):
    """E4M3 of tiles / scale, in x's shape."""
    codes = reference.round_to_e4m3(tiles / scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    return codes.to(torch.float8_e4m3fn)


def with_tiles(scale_of):
    """The answer whose scales are scale_of(tiles, power_of_2)."""

    def answer(x, power_of_2=False):
        tiles = as_tiles(x)
        scale = scale_of(tiles, power_of_2)
        return coded(x, tiles, scale), scale

    return answer


@QUANTIZE_TILES.wrong(
    "You return 448 / amax, the factor that you multiplied by. The scale is what brings the numbers BACK: amax / 448."
)
def reciprocal(x, power_of_2=False):
    codes, scale = reference.quantize_tiles(x, power_of_2)
    return codes, 1 / scale


@QUANTIZE_TILES.wrong(
    "You return the amax itself: the scale is amax / 448, by which codes must be multiplied to come back."
)
def amax_returned(x, power_of_2=False):
    codes, scale = reference.quantize_tiles(x, power_of_2)
    return codes, scale * 448


@QUANTIZE_TILES.wrong("You divide the amax by 480: that code is NaN. The largest number of E4M3 is 448.")
def by_480(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax(-1), p, 480.0))(x, power_of_2)


@QUANTIZE_TILES.wrong("You divide the amax by 127, the largest of int8: of E4M3 it is 448.")
def by_127(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax(-1), p, 127.0))(x, power_of_2)


@QUANTIZE_TILES.wrong("You divide by 57344, the largest number of E5M2: of E4M3 it is 448.")
def by_57344(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax(-1), p, 57344.0))(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "You take the largest number, not the largest MAGNITUDE: a tile's extreme may be negative. tiles.abs().amax(-1)."
)
def without_abs(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.amax(-1), p))(x, power_of_2)


@QUANTIZE_TILES.wrong("One scale serves the whole tensor: take an amax for each tile, over its 128 numbers alone.")
def one_for_all(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax().expand(tiles.shape[:-1]), p))(x, power_of_2)


@QUANTIZE_TILES.wrong("Each row has one scale with you: a row has a scale for each of its tiles of 128 numbers.")
def one_for_a_row(x, power_of_2=False):
    return with_tiles(lambda t, p: scale_by(t.abs().amax((-2, -1)).unsqueeze(-1).expand(t.shape[:-1]), p))(
        x, power_of_2
    )


@QUANTIZE_TILES.wrong(
    "The amax runs down a column, over the tokens: a tile is 1 × 128, numbers of ONE token side by side (the last axis)."
)
def over_the_tokens(x, power_of_2=False):
    scale = scale_by(x.float().abs().amax(-2, keepdim=True), power_of_2)
    return reference.round_to_e4m3(x.float() / scale).to(torch.float8_e4m3fn), scale.squeeze(-2)


@QUANTIZE_TILES.wrong(
    "You take every so-manieth number into a tile: 128 NEIGHBOURS share a scale, so the view is [tiles, 128], not [128, "
    "tiles]."
)
def strided_tiles(x, power_of_2=False):
    K = x.shape[-1]
    tiles = F.pad(x.float(), (0, -K % 128)).unflatten(-1, (128, -1))
    scale = scale_by(tiles.abs().amax(-2), power_of_2)
    codes = reference.round_to_e4m3(tiles / scale.unsqueeze(-2)).flatten(-2)[..., :K]
    return codes.to(torch.float8_e4m3fn), scale


@QUANTIZE_TILES.wrong(
    "The last tile, with fewer than 128 numbers, is lost: pad with zeros to a multiple of 128, and cut the result to K."
)
def last_tile_dropped(x, power_of_2=False):
    whole = x.shape[-1] // 128 * 128
    return reference.quantize_tiles(x[..., :whole], power_of_2)


@QUANTIZE_TILES.wrong("The padding is still in the result: cut x_fp8 back to the K numbers that x has.")
def padding_kept(x, power_of_2=False):
    return reference.quantize_tiles(F.pad(x, (0, -x.shape[-1] % 128)), power_of_2)


@QUANTIZE_TILES.wrong(
    "The padding counts in the amax: pad with ZEROS, which never are the largest, also where all numbers are tiny."
)
def padded_with_ones(x, power_of_2=False):
    K = x.shape[-1]
    codes, scale = reference.quantize_tiles(F.pad(x, (0, -K % 128), value=1.0), power_of_2)
    return codes[..., :K], scale


@QUANTIZE_TILES.wrong(
    "A tile of zeros gives 0 / 0 = NaN: its scale must be positive, so clamp the scale from below (2.0**-126)."
)
def zeros_divided(x, power_of_2=False):
    scale_of_tiles = reference.power_of_two_scale if power_of_2 else (lambda scale: scale)
    return with_tiles(lambda tiles, p: scale_of_tiles(tiles.abs().amax(-1) / 448))(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "You clamp the amax to 1e-4, as DeepSeek's inference code does for activations. Gradients are smaller than that, and "
    "lose their digits: clamp the SCALE to 2.0**-126 instead."
)
def clamped_to_1e_4(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax(-1).clamp_min(1e-4), p))(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "You clamp the amax to 2.0**-126 and divide it by 448 afterwards: clamp the SCALE, which is to be 2.0**-126 at least."
)
def amax_clamped(x, power_of_2=False):
    def scale(tiles, p):
        scale = tiles.abs().amax(-1).clamp_min(SMALLEST) / 448
        return reference.power_of_two_scale(scale) if p else scale

    return with_tiles(scale)(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "Your smallest scale is 1e-12: it is to be 2.0**-126, or tiles of tiny numbers lose their digits."
)
def clamped_to_1e_12(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax(-1), p).clamp_min(1e-12))(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "A tile with a NaN comes out finite: let the NaN through. amax keeps it; nan_to_num and Python's max lose it."
)
def nan_lost(x, power_of_2=False):
    return reference.quantize_tiles(x.nan_to_num(), power_of_2)


@QUANTIZE_TILES.wrong(
    "The NaN is left out of the amax, so its tile gets an ordinary scale: then only one number shows that something broke, "
    "and no scale does. Let amax give NaN for that tile."
)
def nan_left_out(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().nan_to_num(0.0).amax(-1), p))(x, power_of_2)


@QUANTIZE_TILES.wrong("power_of_2 is not looked at: where it is True, round the scale up by your power_of_two_scale.")
def never_a_power(x, power_of_2=False):
    return reference.quantize_tiles(x, False)


@QUANTIZE_TILES.wrong("Your scales are always powers of 2: round them up only where power_of_2 is True.")
def always_a_power(x, power_of_2=False):
    return reference.quantize_tiles(x, True)


@QUANTIZE_TILES.wrong(
    "The numbers are divided by one scale, and another is returned: round the scale up to a power of 2 BEFORE dividing."
)
def power_afterwards(x, power_of_2=False):
    codes, scale = reference.quantize_tiles(x, False)
    return codes, reference.power_of_two_scale(scale) if power_of_2 else scale


@QUANTIZE_TILES.wrong("You multiply by the scale: divide by it, so that the largest number of each tile becomes 448.")
def multiplied(x, power_of_2=False):
    tiles = as_tiles(x)
    scale = scale_by(tiles.abs().amax(-1), power_of_2)
    return coded(x, tiles, 1 / scale), scale


@QUANTIZE_TILES.wrong(
    "The numbers are E4M3's, but lie in float32: four bytes each. Cast them at the end: .to(torch.float8_e4m3fn)."
)
def not_cast(x, power_of_2=False):
    codes, scale = reference.quantize_tiles(x, power_of_2)
    return codes.float(), scale


@QUANTIZE_TILES.wrong(
    "bfloat16 is divided in bfloat16, which rounds once more, and so is the scale: compute in float32, from x.float() on."
)
def in_bfloat16(x, power_of_2=False):
    tiles = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    scale = scale_by(tiles.abs().amax(-1), power_of_2)
    return coded(x, tiles, scale), scale


@QUANTIZE_TILES.wrong("The scales have one axis too many: [..., tiles], without the 1 at the end that dividing needs.")
def axis_kept(x, power_of_2=False):
    codes, scale = reference.quantize_tiles(x, power_of_2)
    return codes, scale.unsqueeze(-1)


@QUANTIZE_TILES.wrong("The two results are swapped: first the E4M3 numbers, then the scales.")
def swapped(x, power_of_2=False):
    return reference.quantize_tiles(x, power_of_2)[::-1]


@QUANTIZE_TILES.wrong("You divide the amax by 240, the largest of another E4M3: here it is 448.")
def by_240(x, power_of_2=False):
    return with_tiles(lambda tiles, p: scale_by(tiles.abs().amax(-1), p, 240.0))(x, power_of_2)


@QUANTIZE_TILES.wrong("A tile of zeros has the scale 1 with you: the smallest is asked for, 2.0**-126 (clamp_min).")
def one_for_zeros(x, power_of_2=False):
    def scale(tiles, p):
        amax = tiles.abs().amax(-1)
        return torch.where(amax == 0, 1.0, scale_by(amax, p))

    return with_tiles(scale)(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "The scale is clamped AFTER the rounding up to a power of 2, which no scale of 0 outlives: clamp first, then round up."
)
def clamped_afterwards(x, power_of_2=False):
    def scale(tiles, p):
        scale = tiles.abs().amax(-1) / 448
        return (reference.power_of_two_scale(scale) if p else scale).clamp_min(SMALLEST)

    return with_tiles(scale)(x, power_of_2)


@QUANTIZE_TILES.wrong(
    "1e-12 is added to every scale, so the largest number no longer becomes 448: clamp from below instead."
)
def little_added(x, power_of_2=False):
    def scale(tiles, p):
        scale = tiles.abs().amax(-1) / 448 + 1e-12
        return reference.power_of_two_scale(scale) if p else scale

    return with_tiles(scale)(x, power_of_2)


@QUANTIZE_TILES.wrong("128 - K % 128 zeros are a whole tile too many where 128 divides K: -K % 128 is 0 there.")
def a_tile_too_many(x, power_of_2=False):
    K = x.shape[-1]
    codes, scale = reference.quantize_tiles(F.pad(x, (0, 128 - K % 128)), power_of_2)
    return codes[..., :K], scale


@QUANTIZE_TILES.wrong(
    "The zeros are put in FRONT of each row, so all tiles are shifted: F.pad(x, (0, n)) appends them."
)
def padded_in_front(x, power_of_2=False):
    K = x.shape[-1]
    codes, scale = reference.quantize_tiles(F.pad(x, (-K % 128, 0)), power_of_2)
    return codes[..., codes.shape[-1] - K :], scale


@QUANTIZE_TILES.wrong("K is no multiple of 128 in all cases: append zeros before you cut the axis into tiles.")
def not_padded(x, power_of_2=False):
    tiles = x.float().unflatten(-1, (-1, 128))
    scale = scale_by(tiles.abs().amax(-1), power_of_2)
    return coded(x, tiles, scale), scale


@QUANTIZE_TILES.wrong("The tiles run on from one row into the next: cut the last axis alone, each row by itself.")
def tiles_of_memory(x, power_of_2=False):
    codes, scale = reference.quantize_tiles(x.flatten(), power_of_2)
    return codes.view(x.shape), scale


@QUANTIZE_TILES.wrong(
    "x has [M, K] in yours: any number of axes may stand before K, so work on the last one, x.shape[-1]."
)
def of_two_axes(x, power_of_2=False):
    M, K = x.shape
    return reference.quantize_tiles(x.reshape(M, K), power_of_2)


# 10.5 ----------------------------------------------------------------------------------------------------------------

QUANTIZE_BLOCKS = Exercise(
    "10.5",
    reference.quantize_blocks,
    minutes=10,
    sizes=[
        {"N": 256, "K": 384, "scales": "any"},
        {"N": 130, "K": 300, "scales": "any"},
        {"N": 300, "K": 260, "scales": "powers of 2"},
        {"N": 64, "K": 136, "scales": "any"},
        {"N": 5, "K": 7, "scales": "any"},
        {"N": 130, "K": 136, "scales": "any", "holds": "a block of zeros"},
        {"N": 20, "K": 260, "scales": "powers of 2", "holds": "a NaN"},
        {"N": 140, "K": 20, "scales": "any", "holds": "tiny numbers"},
        {"N": 9, "K": 130, "scales": "powers of 2", "holds": "zeros alone"},
    ],
    hints=[
        "Exercise 4 made one axis into two, [K] into [tiles, 128]. Do it with both axes: over which of the four is the amax?",
        "blocks = F.pad(w.float(), (0, -K % 128, 0, -N % 128)).reshape(N/128, 128, K/128, 128), rounded up; the amax is over "
        "axes 1 and 3, with keepdim=True it divides as it is. Then back to two axes, and cut to [N, K].",
    ],
)


@QUANTIZE_BLOCKS.inputs
def _(r, N, K, scales, holds=""):
    blocks = numbers(r, -(-N // 128), -(-K // 128), 128, 128)
    w = blocks.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :K].clone()
    if holds == "a block of zeros":
        w[:128, 128:] = 0
    if holds == "a NaN":
        w[3, 200] = NAN
    if holds == "tiny numbers":
        w = w * 2.0**-20
    if holds == "zeros alone":
        w[:] = 0
    return w, scales == "powers of 2"


def as_blocks(w):
    N, K = w.shape
    padded = F.pad(w.float(), (0, -K % 128, 0, -N % 128))
    return padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))


def blocks_by(w, scale):
    """E4M3 of w's blocks [a,128,b,128] / scale, which has their four axes; in w's shape."""
    codes = reference.round_to_e4m3(as_blocks(w) / scale)
    return codes.flatten(2).flatten(0, 1)[: w.shape[0], : w.shape[1]].to(torch.float8_e4m3fn)


def with_blocks(amax_of):
    """The answer whose amax, with four axes, is amax_of(blocks.abs())."""

    def answer(w, power_of_2=False):
        blocks = as_blocks(w).abs()
        scale = scale_by(amax_of(blocks), power_of_2)
        one_each = scale.expand(blocks.shape[0], scale.shape[1], blocks.shape[2], scale.shape[3])
        return blocks_by(w, scale), one_each[:, 0, :, 0]

    return answer


@QUANTIZE_BLOCKS.wrong(
    "Your scales are those of 1 × 128 tiles, one for each row: a block is 128 rows by 128 columns, with ONE scale."
)
def rows_apart(w, power_of_2=False):
    return reference.quantize_tiles(w, power_of_2)


@QUANTIZE_BLOCKS.wrong(
    "Your blocks are 128 × 1, one column of 128 rows: take the amax over 128 columns too, so that 128 × 128 numbers share "
    "one scale."
)
def columns_apart(w, power_of_2=False):
    codes, scale = reference.quantize_tiles(w.T, power_of_2)
    return codes.T, scale.T


@QUANTIZE_BLOCKS.wrong("The scales are transposed: rows of w come first, [N/128, K/128].")
def scales_transposed(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes, scale.T


@QUANTIZE_BLOCKS.wrong("One scale serves the whole matrix: take an amax for each block of 128 × 128.")
def one_for_the_matrix(w, power_of_2=False):
    return with_blocks(lambda blocks: blocks.amax((0, 1, 2, 3), keepdim=True))(w, power_of_2)


@QUANTIZE_BLOCKS.wrong("128 whole rows share a scale: cut the columns into 128s too.")
def bands_of_rows(w, power_of_2=False):
    return with_blocks(lambda blocks: blocks.amax((1, 2, 3), keepdim=True))(w, power_of_2)


@QUANTIZE_BLOCKS.wrong("128 whole columns share a scale: cut the rows into 128s too.")
def bands_of_columns(w, power_of_2=False):
    return with_blocks(lambda blocks: blocks.amax((0, 1, 3), keepdim=True))(w, power_of_2)


@QUANTIZE_BLOCKS.wrong(
    "The amax runs over the wrong axes: in [N/128, 128, K/128, 128] the numbers INSIDE a block are axes 1 and 3."
)
def across_blocks(w, power_of_2=False):
    blocks = as_blocks(w)
    scale = scale_by(blocks.abs().amax((0, 2), keepdim=True), power_of_2)
    return blocks_by(w, scale), scale[0, :, 0, :]


@QUANTIZE_BLOCKS.wrong(
    "reshape(-1, 128, 128) cuts the memory into pieces of 16,384 numbers, rows of full width: those are no blocks. Cut each "
    "axis by itself: [N/128, 128, K/128, 128]."
)
def cut_as_memory(w, power_of_2=False):
    N, K = w.shape
    padded = F.pad(w.float(), (0, -K % 128, 0, -N % 128))
    pieces = padded.reshape(-1, 128, 128)
    scale = scale_by(pieces.abs().amax((1, 2)), power_of_2)
    codes = reference.round_to_e4m3(pieces / scale[:, None, None]).reshape(padded.shape)[:N, :K]
    return codes.to(torch.float8_e4m3fn), scale.reshape(-(-N // 128), -1)


@QUANTIZE_BLOCKS.wrong(
    "You take the largest number, not the largest MAGNITUDE: a block's extreme may be negative. Take abs() first."
)
def extreme_without_abs(w, power_of_2=False):
    scale = scale_by(as_blocks(w).amax((1, 3), keepdim=True), power_of_2)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong(
    "You return 448 / amax. The scale is what brings the numbers BACK, amax / 448; the hub's checkpoints call it "
    "weight_scale_inv, and it is a multiplier too."
)
def inverse(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes, 1 / scale


@QUANTIZE_BLOCKS.wrong(
    "The blocks at the edges are lost: a block with fewer rows or columns has a scale too. Pad with zeros, cut afterwards."
)
def edges_dropped(w, power_of_2=False):
    N, K = (size // 128 * 128 for size in w.shape)
    return reference.quantize_blocks(w[:N, :K], power_of_2)


@QUANTIZE_BLOCKS.wrong("The padding is still in the result: cut w_fp8 back to the N rows and K columns that w has.")
def padding_left(w, power_of_2=False):
    N, K = w.shape
    return reference.quantize_blocks(F.pad(w, (0, -K % 128, 0, -N % 128)), power_of_2)


@QUANTIZE_BLOCKS.wrong(
    "The padding is the wrong way round: F.pad takes the LAST axis first, so it is (0, -K % 128, 0, -N % 128)."
)
def padding_swapped(w, power_of_2=False):
    N, K = w.shape
    padded = F.pad(w.float(), (0, -N % 128, 0, -K % 128))
    n, k = (size // 128 for size in padded.shape)
    blocks = padded.reshape(n, 128, k, 128)
    scale = scale_by(blocks.abs().amax((1, 3), keepdim=True), power_of_2)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("A block of zeros gives 0 / 0 = NaN: clamp the scale from below (2.0**-126), as in exercise 4.")
def zero_block_divided(w, power_of_2=False):
    blocks = as_blocks(w)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    scale = reference.power_of_two_scale(scale) if power_of_2 else scale
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("A block with a NaN comes out finite: let the NaN through, as in exercise 4.")
def nan_block_lost(w, power_of_2=False):
    return reference.quantize_blocks(w.nan_to_num(), power_of_2)


@QUANTIZE_BLOCKS.wrong("power_of_2 is not looked at: where it is True, round the scale up by your power_of_two_scale.")
def power_ignored(w, power_of_2=False):
    return reference.quantize_blocks(w, False)


@QUANTIZE_BLOCKS.wrong(
    "Each number has its scale beside it: that takes four bytes a number. Return one for each block, [N/128, K/128]."
)
def scale_for_each(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes, scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]


@QUANTIZE_BLOCKS.wrong("The scales keep four axes: give [N/128, K/128], without the 1s that dividing needs.")
def four_axes(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes, scale[:, None, :, None]


@QUANTIZE_BLOCKS.wrong(
    "The numbers are E4M3's, but lie in float32, four bytes each: .to(torch.float8_e4m3fn) at the end."
)
def left_in_float32(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes.float(), scale


@QUANTIZE_BLOCKS.wrong("The two results are swapped: first the E4M3 numbers, then the scales.")
def results_swapped(w, power_of_2=False):
    return reference.quantize_blocks(w, power_of_2)[::-1]


@QUANTIZE_BLOCKS.wrong("Your scales are always powers of 2: round them up only where power_of_2 is True.")
def power_always(w, power_of_2=False):
    return reference.quantize_blocks(w, True)


@QUANTIZE_BLOCKS.wrong(
    "The numbers are divided by one scale, and another is returned: round up to a power of 2 BEFORE dividing."
)
def power_after_dividing(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, False)
    return codes, reference.power_of_two_scale(scale) if power_of_2 else scale


@QUANTIZE_BLOCKS.wrong("You return the amax itself: the scale is amax / 448.")
def amax_itself(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes, scale * 448


@QUANTIZE_BLOCKS.wrong("You divide the amax by 480: that code is NaN. The largest number of E4M3 is 448.")
def blocks_by_480(w, power_of_2=False):
    scale = scale_by(as_blocks(w).abs().amax((1, 3), keepdim=True), power_of_2, 480.0)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("You multiply by the scale: divide by it, so that the largest number of each block becomes 448.")
def blocks_multiplied(w, power_of_2=False):
    scale = scale_by(as_blocks(w).abs().amax((1, 3), keepdim=True), power_of_2)
    return blocks_by(w, 1 / scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong(
    "squeeze() drops every axis of length 1, also the one that counts blocks: take scale[:, 0, :, 0], or squeeze((1, 3))."
)
def all_squeezed(w, power_of_2=False):
    codes, scale = reference.quantize_blocks(w, power_of_2)
    return codes, scale.squeeze()


@QUANTIZE_BLOCKS.wrong(
    "The blocks were permuted, and reshaped as they lay: permute back, to [N/128, 128, K/128, 128], before reshaping."
)
def not_permuted_back(w, power_of_2=False):
    scale = scale_by(as_blocks(w).abs().amax((1, 3), keepdim=True), power_of_2)
    codes = reference.round_to_e4m3(as_blocks(w) / scale).permute(0, 2, 1, 3)
    a, b = codes.shape[:2]
    return codes.reshape(128 * a, 128 * b)[: w.shape[0], : w.shape[1]].to(torch.float8_e4m3fn), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("You clamp the amax to 1e-4: weights may be smaller, so clamp the SCALE, to 2.0**-126.")
def blocks_clamped_to_1e_4(w, power_of_2=False):
    scale = scale_by(as_blocks(w).abs().amax((1, 3), keepdim=True).clamp_min(1e-4), power_of_2)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("Your smallest scale is 1e-12: it is to be 2.0**-126, as in exercise 4.")
def blocks_clamped_to_1e_12(w, power_of_2=False):
    scale = scale_by(as_blocks(w).abs().amax((1, 3), keepdim=True), power_of_2).clamp_min(1e-12)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("The NaN is left out of the amax, so no scale shows it: let amax give NaN for its block.")
def nan_left_out_of_the_block(w, power_of_2=False):
    scale = scale_by(as_blocks(w).abs().nan_to_num(0.0).amax((1, 3), keepdim=True), power_of_2)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong(
    "N // 128 and K // 128 leave the blocks at the edges out: pad first, then cut into n = ceil(N/128) times 128."
)
def blocks_not_padded(w, power_of_2=False):
    N, K = w.shape
    blocks = w.reshape(N // 128, 128, K // 128, 128)
    scale = scale_by(blocks.abs().amax((1, 3), keepdim=True), power_of_2)
    return blocks_by(w, scale), scale[:, 0, :, 0]


@QUANTIZE_BLOCKS.wrong("Each 128 rows have the scales of their first row's tiles: the amax runs over the 128 rows too.")
def scales_of_the_first_row(w, power_of_2=False):
    codes, scale = reference.quantize_tiles(w, power_of_2)
    return codes, scale[::128]
