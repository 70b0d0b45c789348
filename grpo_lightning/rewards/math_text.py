r"""Answers as people and models write them: LaTeX and Unicode made plain, read as numbers, compared."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple
from unicodedata import normalize

_SAME_CHARACTER = str.maketrans(
    dict.fromkeys("−–‐‑﹣－", "-")
    | dict.fromkeys("×·⋅", "*")
    | dict.fromkeys("⁄∕", "/")
    | dict.fromkeys("\u00a0\u2009\u202f", "~")
    | {"∞": r"\infty ", "π": r"\pi ", "％": "%", "＄": "$"}
)
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\d))"
_SIMPLE = re.compile(r"\s*[-+]?\\?[\w.,]*\s*")


def _over(fraction: re.Match[str]) -> str:
    above, below = (fraction[1] or fraction[2] or ""), (fraction[3] or fraction[4] or "")
    a, b = (x if _SIMPLE.fullmatch(x) else f"({x})" for x in (above, below))
    before = fraction.string[max(fraction.start() - 1, 0) : fraction.start()]
    return f"{' ' if before.isdigit() else ''}{a.strip()}/{b.strip()}"


_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\\!|\\(?:left|right|displaystyle)(?![a-z])|\\[()\[\]]"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|~)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[,;:> ]|\\q?quad(?![a-z])|~"), " "),
    (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\[dtc]?frac" + _ARGUMENT + _ARGUMENT), _over),
    (re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])"), " "),
    (re.compile("[¼-¾⅐-⅞]"), lambda m: normalize("NFKC", m[0]).replace("⁄", "/")),
    (re.compile(r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?|\\degree(?![a-z])"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![a-z])"), "*"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\bnegative\s+(?=[\d.$])", re.IGNORECASE), "-"),
)

_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_DECIMAL = r"(?>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
_POWER = r"\s*\^\s*\{?\s*([-+]?\d+)\s*\}?"
# Atomic, so that no part of a number is taken for it where the whole is none.
_VALUE = (
    rf"(?>(?P<mixed>\d+\s+(?=\d+\s*/\s*\d))?(?P<above>{_DECIMAL})(?:\s*/\s*(?P<below>-?{_DECIMAL}))?"
    rf"(?:[eE](?P<e>[-+]?\d+)(?!\w)|\s*\*\s*10{_POWER.replace('(', '(?P<ten>', 1)}"
    rf"|{_POWER.replace('(', '(?P<power>', 1)})?)(?!\s*\^)"
    rf"(?:\s+(?P<scale>{'|'.join(_SCALES)})\b)?"
)
_SIGN = r"(?P<minus>[-+]?)\s*+(?P<money>[$€£¥₹]?)\s*+(?P<minus_2>-?)\s*+"
_NUMBER = re.compile(
    rf"{_SIGN}{_VALUE}(?:\s*(?P<unit>[A-Za-z%°][^\d,;=<>|+*()\[\]\\]*?(?:\^\{{?-?\d\}}?)?))?"
)
# In running text: neither inside a word or number nor an exponent or index; a letter behind it belongs to it.
_NUMBER_IN_TEXT = re.compile(
    rf"(?<![\w.^])(?<!\^\{{)(?<!_\{{)(?<!\^-)(?<!\^\{{-)"
    rf"(?:(?:(?<==)|(?<=\())\s*-\s*|-)?[$€£¥₹]?(?:(?<=[$€£¥₹])-)?{_VALUE}(?:[A-Za-z](?![A-Za-z]))?"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])")
_UNITS_OF_ONE_LETTER = frozenset("mghsl")
_NO_UNITS = frozenset({"or", "and", "to", "pi", "sqrt", "log", "ln", "sin", "cos", "tan"})
_SAME_UNIT = {"percent": "%", "dollar": "$", "degree": "°", "euro": "€", "pound": "£"}
_NAME_AND_EQUALS = re.compile(r"(?:[A-Za-z](?:_\{?\w+\}?)?\s*=(?!=)\s*)+")


class Number(NamedTuple):
    """An exact value, and its unit as plain text, which may be empty."""

    value: Fraction
    unit: str


def clean(text: str) -> str:
    """Returns the text with the LaTeX and the Unicode of numbers made plain; linear in its length."""
    text = text.translate(_SAME_CHARACTER)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text


def last_number(text: str) -> str | None:
    """Returns the last number of running text, as it stands there, or None."""
    found = [m[0] for m in _NUMBER_IN_TEXT.finditer(clean(text))]
    return found[-1].strip() if found else None


def number(text: str) -> Number | None:
    """Returns the number that the whole text is, with its unit; None if it is none, or absurdly large."""
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), _bare(text))
    if (inner := re.fullmatch(r"[({]([^(){},]*)[)}]", text)) is not None:
        text = inner[1].strip()
    m = _NUMBER.fullmatch(text)
    if m is None or (unit := _unit(m["money"], m["unit"] or "")) is None:
        return None
    try:
        value = _value(m)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts; division by zero
        return None
    return (
        None
        if value is None
        else Number(-value if (m["minus"] == "-") != (m["minus_2"] == "-") else value, unit)
    )


def _value(m: re.Match[str]) -> Fraction | None:
    above, below = (Fraction((m[k] or "1").replace(",", "").rstrip(".")) for k in ("above", "below"))
    value = int(m["mixed"] or 0) + above / below
    ten, power = m["e"] or m["ten"] or "0", m["power"] or "1"
    digits = abs(int(ten)) + abs(int(power)) * (m.end("below" if m["below"] else "above") - m.start("above"))
    if digits > 4000:
        return None
    if m["power"] is not None:
        value = value ** int(power)
    return value * Fraction(10) ** int(ten) * _SCALES.get(m["scale"] or "", 1)


def _unit(money: str, text: str) -> str | None:
    """Returns the unit in one spelling, or None if this is none: a letter behind a number is a variable."""
    words = [w.casefold() for w in re.findall(r"[A-Za-z]+", text)]
    if _NO_UNITS & set(words) or (
        text[:1].isalpha() and len(words[0]) == 1 and words[0] not in _UNITS_OF_ONE_LETTER
    ):
        return None

    def one(word: re.Match[str]) -> str:
        name = word[0].casefold()
        name = name[:-1] if len(name) > 2 and name.endswith("s") else name
        return _SAME_UNIT.get(name, name)

    return money + re.sub(r"[\s{}.]", "", re.sub("[A-Za-z]+", one, text)).removeprefix(money or "\0")


def same(a: str, b: str) -> bool:
    """Returns whether two answers are the same number, list of answers, or text."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x.value == y.value and (x.unit == y.unit or not (x.unit and y.unit))
    a, b = _bare(a), _bare(b)
    if bool(_NAME_AND_EQUALS.match(a)) != bool(_NAME_AND_EQUALS.match(b)):  # x = 5 is 5, but not y = 5
        return same(_NAME_AND_EQUALS.sub("", a, 1), _NAME_AND_EQUALS.sub("", b, 1))
    if (
        (p := _list(a)) is not None
        and (q := _list(b)) is not None
        and p[0] == q[0]
        and len(p[1]) == len(q[1])
    ):
        return all(same(i, j) for i, j in zip(p[1], q[1], strict=True))
    return plain(a) == plain(b)


def _bare(text: str) -> str:
    """Returns the cleaned text without blanks, full stops and dollar signs around it."""
    text = clean(text).strip().rstrip(".").strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == "$" else text


def plain(text: str) -> str:
    """Returns the text as it is compared: without case, blanks, dollar signs, and braces of one character."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "~", _bare(text))
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"[\s$]", "", text)).casefold()


def _list(text: str) -> tuple[str, list[str]] | None:
    """Returns brackets and members of a tuple, interval, set or bare list; None if there is only one."""
    brackets = ""
    if (m := re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text, re.DOTALL)) is not None:
        brackets, text = m[1] + m[3], m[2]
    members, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return None
        if c == "," and not depth:
            members.append("")
        else:
            members[-1] += c
    return (brackets, members) if len(members) > 1 else None
