"""Numbers: bounds and divisors within what llguidance computes with.

llguidance writes a number as decimal digits and compares digits with a bound that it holds in 64 bits; jsonschema
reads those digits as Python's int or float and compares that. The two differ where digits round to a float across
an exclusive bound, where a bound or a constant is beyond 2^53, and, for most fractions, in what a multiple is.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import cast

from agentkit.runtime.schema.kinds import Json, admits, without
from agentkit.runtime.schema.report import Note

_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_KEYWORDS = (*_LOWER, *_UPPER, "multipleOf")

#: Integers up to here are all floats; and the greatest float below 2^63.
EXACT, GREATEST = 2**53, 2**63 - 1024
# Bounds on fractions: those beyond the second are out of llguidance's reach, and stand for the first where that is
# room enough.
_NEAR, _FAR = 10**15 - 1, 10**17
# A float tells 15 significant digits apart: bounds below a million, and nine digits after the point.
_SHORT, _PLACES = 10**6, 9
# Multiples that are tried one by one: about 10 ms.
_TRIED = 50_000


def rewrite(part: Json, note: Note) -> Json:
    """A part whose number keywords llguidance takes, and takes as jsonschema does."""
    if not any(key in part for key in _KEYWORDS):
        return part
    if not admits(part, "number"):
        return without(part, *_KEYWORDS)
    whole = not _fractional(part)
    part = _divisor(part, whole, note)
    return _integers(part, note) if whole else _fractions(part, note)


def _fractional(part: Json) -> bool:
    """Whether the ``type`` of a part leaves room for more numbers than integers."""
    kinds = part.get("type", "number")
    return "number" in (cast("list[str]", kinds) if isinstance(kinds, list) else [kinds])


def _integers(part: Json, note: Note) -> Json:
    """Bounds as inclusive integers that 64 bits hold exactly, rounded inwards."""
    low = max((_above(part[key], key != "minimum") for key in _LOWER if key in part), default=None)
    high = min((-_above(-part[key], key != "maximum") for key in _UPPER if key in part), default=None)
    if (low is not None and low > GREATEST) or (high is not None and high < -GREATEST):
        keyword = "minimum" if low is not None and low > GREATEST else "maximum"
        note(keyword, "refused", f"integers beyond {GREATEST:,} cannot be written under a bound. Use another bound.")
        return part
    bounds: Json = {}
    if low is not None:
        bounds["minimum"] = max(_exact(low), -GREATEST)
        if low >= 10**18 and high is None:
            high = GREATEST  # llguidance cannot write an unbounded number of 19 digits
    if high is not None:
        bounds["maximum"] = min(-_exact(-high), GREATEST)
        if high <= -(10**18) and low is None:
            bounds["minimum"] = -GREATEST
    return {**without(part, *_LOWER, *_UPPER), **bounds}


def _above(bound: float, exclusive: bool) -> int:
    """The least integer at or above `bound`, or above it."""
    least = math.ceil(bound)
    return least + 1 if exclusive and least == bound else least


def _exact(value: int) -> int:
    """The least integer at or above `value` that is a float."""
    near = int(float(value))
    return near if near >= value else int(math.nextafter(float(value), math.inf))


def _fractions(part: Json, note: Note) -> Json:
    """Bounds that no digits can round across, and that llguidance can reach."""
    given = {key: part[key] for key in (*_LOWER, *_UPPER) if key in part}
    rest = without(part, *given)
    exclusive = [key for key in given if key.startswith("exclusive")]
    fine = all(abs(value) <= _SHORT and round(value, 6) == value for value in given.values())
    if exclusive and fine:
        rest.setdefault("multipleOf", 10**-_PLACES)
    elif not fine:
        low = max((_float(given[key], key != "minimum") for key in _LOWER if key in given), default=None)
        high = min((-_float(-given[key], key != "maximum") for key in _UPPER if key in given), default=None)
        if (low is not None and low >= _FAR) or (high is not None and high <= -_FAR):
            keyword = next(key for key in given if abs(given[key]) >= _FAR)
            note(keyword, "refused", f"numbers beyond {_FAR:,} cannot be written under a bound. Use another bound.")
            return part
        given = {}
        if low is not None:
            given["minimum"] = low if low > -_FAR else -_NEAR if high is None or high > -_NEAR else -_FAR
        if high is not None:
            given["maximum"] = high if high < _FAR else _NEAR if low is None or low < _NEAR else _FAR
    return {**rest, **given}


def _float(bound: float, exclusive: bool) -> float:
    """The least float at or above `bound`, or above it."""
    near = float(min(max(bound, -(10**300)), 10**300))
    return near if near > bound or (near == bound and not exclusive) else math.nextafter(near, math.inf)


def _divisor(part: Json, whole: bool, note: Note) -> Json:
    """A divisor that decimal digits and floats agree about, and that llguidance can hold."""
    divisor = part.get("multipleOf")
    if divisor is None:
        return part
    if not _holds(divisor):
        note("multipleOf", "verified", f"a divisor such as {divisor!r} has too many digits to be enforced.")
        coarse = 10.0 ** -len(str(divisor).partition(".")[2])
        return {**part, "multipleOf": coarse} if 10**-_PLACES <= coarse < 1 else without(part, "multipleOf")
    if isinstance(divisor, int) or _dyadic(divisor):
        return part
    if not _agrees(part, divisor, whole):
        note("multipleOf", "verified", f"not every multiple of {divisor!r} is one in the arithmetic of floats.")
    return part


def _holds(divisor: float) -> bool:
    """Whether llguidance can hold a divisor, as a coefficient of 32 bits and a power of ten that it finds in floats."""
    value, places = float(divisor), 0
    while value % 1 and places < 40:
        value, places = value * 10, places + 1
    if value > 0xFFFF_FFFF or value % 1:
        return False
    return Fraction(int(value), 10**places) == Fraction(repr(divisor))


def _dyadic(divisor: float) -> bool:
    """Whether a divisor is a multiple of 2^-10, so that floats divide by it without rounding."""
    return (Fraction(divisor) * 1024).denominator == 1 and divisor < EXACT


def _agrees(part: Json, divisor: float, whole: bool) -> bool:
    """Whether jsonschema takes each multiple within the bounds for one; False where there are too many to try."""
    lows = [part[key] for key in _LOWER if key in part]
    highs = [part[key] for key in _UPPER if key in part]
    if not lows or not highs:
        return False
    step = Fraction(repr(divisor))
    if whole:
        step *= step.denominator
    first, last = math.ceil(Fraction(max(lows)) / step), math.floor(Fraction(min(highs)) / step)
    if last - first > _TRIED:
        return False
    quotients = (float(k * step) / divisor for k in range(first, last + 1))
    return all(int(quotient) == quotient for quotient in quotients)
