"""Numbers: bounds and divisors within what llguidance computes with.

llguidance writes a number as decimal digits and compares digits with a bound that it holds in 64 bits; jsonschema
reads those digits as Python's int or float and compares that. The two differ where digits round to a float across
an exclusive bound, where a bound or a constant is beyond 2^53, and, for most fractions, in what a multiple is.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from typing import cast

from agentkit.runtime.schema.kinds import COMBINING, Json, admits, without
from agentkit.runtime.schema.report import Note

_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_KEYWORDS = (*_LOWER, *_UPPER, "multipleOf")

#: Integers up to here are all floats; and the greatest float below 2^63.
EXACT, GREATEST = 2**53, 2**63 - 1024
# Bounds on fractions: those beyond the second are out of llguidance's reach, and stand for the first where that is
# room enough.
_NEAR, _FAR = 10**15 - 1, 10**17
# No bound is farther out than any of these.
_BEYOND = 10**30
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
    least = math.ceil(min(max(bound, -_BEYOND), _BEYOND))
    return least + 1 if exclusive and least == bound else least


def _exact(value: int) -> int:
    """The least integer at or above `value` that is a float."""
    near = int(float(value))
    return near if near >= value else int(math.nextafter(float(value), math.inf))


def _fractions(part: Json, note: Note) -> Json:
    """Bounds that no digits can round across, and that llguidance can reach."""
    given = {key: part[key] for key in (*_LOWER, *_UPPER) if key in part}
    rest = without(part, *given)
    if all(abs(value) <= _SHORT and round(value, 6) == value for value in given.values()):
        if any(key.startswith("exclusive") for key in given):
            rest.setdefault("multipleOf", 10**-_PLACES)
        return _cut(rest, _opened(given))
    low = max((_decimal(given[key], key != "minimum") for key in _LOWER if key in given), default=None)
    high = min((-_decimal(-given[key], key != "maximum") for key in _UPPER if key in given), default=None)
    if (low is not None and low >= _FAR) or (high is not None and high <= -_FAR):
        keyword = next(key for key in given if abs(given[key]) >= _FAR)
        note(keyword, "refused", f"numbers beyond {_FAR:,} cannot be written under a bound. Use another bound.")
        return part
    bounds: Json = {}
    if low is not None:
        near = -_NEAR if high is None or high > -_NEAR else -_FAR
        bounds["minimum"] = float(low) if low > -_FAR else near
    if high is not None:
        near = _NEAR if low is None or low < _NEAR else _FAR
        bounds["maximum"] = float(high) if high < _FAR else near
    return {**rest, **bounds}


def _opened(given: Json) -> Json:
    """Bounds none of which is an excluded integer less than one away from the other: llguidance would admit it."""
    low, high = given.get("exclusiveMinimum"), given.get("exclusiveMaximum")
    if low is not None and low >= 0 and low % 1 == 0 and min(given.get(key, math.inf) for key in _UPPER) < low + 1:
        given = {**without(given, "exclusiveMinimum"), "minimum": max(low + 10**-_PLACES, given.get("minimum", low))}
    if high is not None and high <= 0 and high % 1 == 0 and max(given.get(key, -math.inf) for key in _LOWER) > high - 1:
        given = {**without(given, "exclusiveMaximum"), "maximum": min(high - 10**-_PLACES, given.get("maximum", high))}
    return given


def _cut(part: Json, given: Json) -> Json:
    """A part with bounds, and with numbers that are a bound with fewer digits: 3.1 under a maximum of 3.14.

    llguidance wants as many digits as the bound has of every number that begins like it.
    """
    low = max((given[key] for key in _LOWER if key in given), default=-_NEAR)
    high = min((given[key] for key in _UPPER if key in given), default=_NEAR)
    branches = [given]
    branches += [{**without(given, *_UPPER), "maximum": cut} for cut in _shortened(high) if low <= cut < high]
    branches += [{**without(given, *_LOWER), "minimum": -cut} for cut in _shortened(-low) if low < -cut <= high]
    if len(branches) == 1 or not COMBINING.isdisjoint(part):
        return {**part, **given}
    ours: Json = {}
    if not given.keys() & set(_UPPER):
        ours["maximum"] = _NEAR
    if not given.keys() & set(_LOWER):
        ours["minimum"] = -_NEAR
    part.setdefault("multipleOf", 10**-_PLACES)
    return {**part, **ours, "anyOf": branches}


def _shortened(bound: float) -> list[float]:
    """A positive number with one digit after the point, with two, and so on."""
    places = len(format(Decimal(repr(bound)), "f").partition(".")[2]) if bound > 0 else 0
    return [math.floor(Decimal(repr(bound)) * 10**n) / 10**n for n in range(1, places)]


def _decimal(bound: float, exclusive: bool) -> Decimal:
    """The least number of 15 digits at or above `bound`, or above it: llguidance reads more digits inexactly."""
    exact = Decimal(repr(min(max(bound, -_BEYOND), _BEYOND)))
    step = Decimal(1).scaleb(max(exact.adjusted() - 14, -25) if exact else -_PLACES)
    least = (exact / step).to_integral_value(ROUND_CEILING) * step
    return least + step if exclusive and least == exact else least


def _divisor(part: Json, whole: bool, note: Note) -> Json:
    """A divisor that decimal digits and floats agree about, and that llguidance can hold."""
    divisor = part.get("multipleOf")
    if divisor is None:
        return part
    if not _holds(divisor):
        note("multipleOf", "verified", f"a divisor such as {divisor!r} has too many digits to be enforced.")
        return _coarser(part, divisor)
    if not isinstance(divisor, int) and not _dyadic(divisor) and not _agrees(part, divisor, whole):
        note("multipleOf", "verified", f"not every multiple of {divisor!r} is one in the arithmetic of floats.")
    return part if whole else _shorter(part, divisor, note)


def _coarser(part: Json, divisor: float) -> Json:
    """A part with as many digits after the point as multiples of `divisor` have."""
    exact = Decimal(repr(divisor)).normalize()
    places = len(exact.as_tuple().digits) - 1 - exact.adjusted() if exact.is_finite() else 0
    return {**part, "multipleOf": 10.0**-places} if 0 < places <= _PLACES else without(part, "multipleOf")


def _shorter(part: Json, divisor: float, note: Note) -> Json:
    """A part whose multiples may also be written with fewer digits than the divisor has: 0.5 under 0.25.

    llguidance wants all of them unless the coefficient is below 10.
    """
    step = Fraction(repr(divisor))
    places = next(n for n in range(40) if (step * 10**n).denominator == 1)
    if places < 2 or step * 10**places < 10:
        return part
    steps = [step, *(_common(step, Fraction(1, 10**n)) for n in range(1, places))]
    if not COMBINING.isdisjoint(part) or steps[-1] * 10**places > 0xFFFF_FFFF:
        note("multipleOf", "verified", f"multiples of {divisor!r} cannot be enforced beside other keywords.")
        return _coarser(part, divisor)
    return {**without(part, "multipleOf"), "anyOf": [{"multipleOf": float(one)} for one in dict.fromkeys(steps)]}


def _common(one: Fraction, other: Fraction) -> Fraction:
    """The least common multiple."""
    denominator = math.lcm(one.denominator, other.denominator)
    return Fraction(math.lcm(int(one * denominator), int(other * denominator)), denominator)


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
