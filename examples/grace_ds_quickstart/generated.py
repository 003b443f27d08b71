"""Code that a program wrote: eight templates of which every document draws its fields anew.

The text reads like code written by hand, so a filter for quality passes it; no two rows have the same fields, so a search for
copies does not find it; and there is little to learn in it: a model that has seen a few hundred rows knows the template, and the
fields cannot be known.  All functions are deterministic in the generator that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grace_ds.records import Array
from grace_ds_quickstart.pollute import JunkKind, JunkSource

Template = Callable[[np.random.Generator], str]
CHARACTERS = 3  # of text drawn for each token that is still missing: about what a token has, so few draws are enough

_NOUNS = """
action address argument attribute batch block byte cache callback check child class code color command config content context
copy count data date default domain edge element encoding entry error event file format frame function group handle handler
hash header hint host import index input instance item job key level line list loader lock loop mail match message method mode
module name node number object option order output owner page parent parser part path pool port position prefix process
profile queue range result role root route row rule section server size source space stack stage state statement stream string
table tag text thread time timeout token trace type unit user value vector version widget width window word
"""
_VERBS = """
add append bind build call check close copy count decode encode find format get handle import insert join list load lock make
match open pack parse print process read rename replace reset return run save send set sort start stop wrap write
"""
_ADJECTIVES = """
active base binary closed current custom empty extra final first fixed full global inner internal invalid last left local main
mutable native new next nested normal old open optional outer partial public random raw recent remote required reverse right
short simple single sorted special static strict valid
"""
NOUNS, VERBS, ADJECTIVES = (tuple(words.split()) for words in (_NOUNS, _VERBS, _ADJECTIVES))
VOCABULARY = (NOUNS, VERBS, ADJECTIVES)
SUBJECT = (14, 5, 5)  # how many of each one document has


class Fields:
    """Draws the fields of a document, whose words are a few of all: a file has a subject, and repeats its words.

    Args:
        rng: the only source of randomness.
        vocabulary: nouns, verbs and adjectives, at least ``SUBJECT`` of each.
    """

    def __init__(self, rng: np.random.Generator, vocabulary: Sequence[tuple[str, ...]] = VOCABULARY) -> None:
        self._rng = rng
        self._nouns, self._verbs, self._adjectives = (
            tuple(words[at] for at in rng.choice(len(words), size=size, replace=False))
            for words, size in zip(vocabulary, SUBJECT, strict=True)
        )

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high)."""
        return int(self._rng.integers(low, high))

    def one_of(self, choices: tuple[str, ...]) -> str:
        """One of ``choices``."""
        return choices[int(self._rng.integers(0, len(choices)))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self._rng.random() < probability)

    def noun(self) -> str:
        """A noun."""
        return self.one_of(self._nouns)

    def verb(self) -> str:
        """A verb."""
        return self.one_of(self._verbs)

    def adjective(self) -> str:
        """An adjective."""
        return self.one_of(self._adjectives)

    def words(self, count: int) -> list[str]:
        """``count`` words such as make up an identifier; the last one is a noun."""
        first = [self.adjective() if self.chance(0.3) else self.noun() for _ in range(count - 1)]
        return [*first, self.noun()]

    def snake(self, count: int = 2) -> str:
        """An identifier, lower_case."""
        return "_".join(self.words(count))

    def camel(self, count: int = 2) -> str:
        """An identifier, CamelCase."""
        return "".join(map(str.title, self.words(count)))

    def upper(self, count: int = 2) -> str:
        """An identifier, UPPER_CASE."""
        return self.snake(count).upper()

    def distinct(self, count: int, words: int = 2) -> list[str]:
        """``count`` different identifiers, lower_case."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.snake(words)] = None
        return list(found)

    def phrase(self) -> str:
        """What a comment speaks of: three or four words, with an article or without."""
        form = self.number(0, 3)
        if form == 0:
            return f"the {self.adjective()} {self.noun()} of {self.noun()} {self.noun()}"
        if form == 1:
            return f"{self.adjective()} {self.noun()} for the {self.noun()} {self.noun()}"
        return f"{self.noun()} {self.noun()} {self.noun()}"

    def literal(self) -> str:
        """A constant as it stands in Python."""
        form = self.number(0, 6)
        if form < 2:
            return f'"{self.snake(form + 1)}"'
        if form < 4:
            return str(self.number(0, 10) if form == 2 else self.number(10, 5000))
        return "None" if form == 4 else "True"


def codec_table(rng: np.random.Generator) -> str:
    """The table of a character set: the name of a sign and what it is written as."""
    f = Fields(rng)
    name = f"{f.noun()}_{f.number(100, 9999)}"
    lines = [f"# Table of the character set {name}, made from {f.snake()}.txt by a script.", f'encoding = "{name}"', "table = {"]
    code = f.number(0, 200) * 16
    for _ in range(f.number(16, 40)):
        code += f.number(1, 9)
        lines.append(f'    {code:#x}: "{f.snake(3)}",  # {f.adjective()} {f.noun()} {f.noun()} with {f.adjective()} {f.noun()}')
    return "\n".join([*lines, "}", ""])


def accessor_class(rng: np.random.Generator) -> str:
    """A class of properties, each with a getter and a setter."""
    f = Fields(rng)
    lines = [f"class {f.camel()}({f.camel()}):", f'    """Access to {f.phrase()}."""', ""]
    for name in f.distinct(f.number(5, 12), 3):
        lines += [
            "    @property",
            f"    def {name}(self):",
            f'        """Return {f.phrase()} and {f.phrase()}."""',
            f"        return self.{f.verb()}_{f.noun()}({f.snake()}, {f.snake()})",
            "",
            f"    def set_{name}(self, {f.snake()}, {f.noun()}={f.literal()}):",
            f"        self.{f.verb()}_{f.snake()}({f.noun()}, {f.snake(3)}, {f.literal()})",
            "",
        ]
    return "\n".join(lines)


def unit_tests(rng: np.random.Generator) -> str:
    """Test methods that differ in what they call and what they expect."""
    f = Fields(rng)
    lines = [f"class Test{f.camel()}(GeneratedTestCase):", ""]
    for _ in range(f.number(6, 14)):
        verb, noun = f.verb(), f.noun()
        given = f"{f.noun()}.{f.noun()}, {f.snake()}={f.literal()}, {f.noun()}={f.literal()}"
        lines += [
            f"    def test_{verb}_{noun}_{f.adjective()}_{f.noun()}(self):",
            f"        {f.snake()} = {f.noun()}.{verb}_{noun}({given})",
            f"        self.assertEqual({f.snake(3)}, {f.literal()})",
            f'        self.assertIn("{f.adjective()} {f.noun()} {f.noun()}", {f.snake()}.{f.noun()})',
            "",
        ]
    return "\n".join(lines)


def descriptor_table(rng: np.random.Generator) -> str:
    """The descriptor of a message with its fields, such as a compiler of interfaces writes."""
    f = Fields(rng)
    name = f.camel()
    lines = [f"{f.upper()} = Descriptor(", f'    name="{name}",', f'    file="{f.noun()}/{f.snake()}.{name}",', "    fields=["]
    for field in f.distinct(f.number(8, 22), 3):
        kind = f.one_of(("INT", "STRING", "BYTES", "BOOL"))
        lines.append(f'        Field("{field}", {f.number(1, 400)}, {kind}, {f.literal()}, {f.snake()}, comment="{f.phrase()}"),')
    start = f.number(100, 5000)
    return "\n".join([*lines, "    ],", f"    start={start},", f"    end={start + f.number(50, 900)},", ")", ""])


def argument_parser(rng: np.random.Generator) -> str:
    """The options of a command, one after another."""
    f = Fields(rng)
    lines = [f"def {f.verb()}_{f.noun()}_arguments(parser):", f'    """Add options for {f.phrase()}."""']
    for name in f.distinct(f.number(8, 20), 2):
        kind = f.one_of(("int", "str", "float", "Path"))
        lines += [
            f'    add("--{name.replace("_", "-")}", "{f.snake(3)}", {kind}, {f.literal()}, {f.noun()}.{f.snake()},',
            f'        help="{f.verb()} {f.phrase()} before {f.phrase()}")',
        ]
    return "\n".join([*lines, "    return parser", ""])


def column_definitions(rng: np.random.Generator) -> str:
    """The tables of a database as classes, a column a line."""
    f = Fields(rng)
    lines: list[str] = []
    for _ in range(f.number(2, 4)):
        lines += [f"class {f.camel()}(Base):", f'    __tablename__ = "{f.snake()}"', ""]
        for name in f.distinct(f.number(6, 12), 3):
            kind = f.one_of(("Integer", "Boolean", f"String({f.number(8, 256)})", f"ForeignKey({f.camel()}.{f.noun()})"))
            lines.append(f'    {name} = Column({kind}, {f.literal()}, {f.snake()}, doc="{f.verb()} {f.phrase()}")')
        lines.append("")
    return "\n".join(lines)


def message_catalogue(rng: np.random.Generator) -> str:
    """Messages by their number and name."""
    f = Fields(rng)
    lines = [f"# Messages of the {f.noun()} {f.noun()}, collected from the sources.", f"{f.upper(1)}_MESSAGES = {{"]
    code = f.number(1, 90) * 100
    for _ in range(f.number(10, 30)):
        code += f.number(1, 30)
        form = f.number(0, 3)
        if form == 0:
            text = f"Cannot {f.verb()} {f.phrase()}: %s is {f.adjective()}"
        elif form == 1:
            text = f"No {f.noun()} {f.noun()} in {f.phrase()}"
        else:
            text = f"{f.noun().title()} %d of {f.phrase()} must be {f.adjective()}, not %r"
        lines.append(f'    "{f.snake(3)}": ({code}, "{text}"),')
    return "\n".join([*lines, "}", ""])


def exception_classes(rng: np.random.Generator) -> str:
    """Exceptions, each with its message and the fields that it carries."""
    f = Fields(rng)
    base = f"{f.camel()}Error"
    lines: list[str] = []
    for _ in range(f.number(4, 10)):
        first, second = f.distinct(2, 2)
        lines += [
            f"class {f.camel(3)}Error({base}):",
            f'    """Raised when {f.phrase()} does not {f.verb()} {f.phrase()}."""',
            "",
            f"    def __init__(self, {first}, {second}={f.literal()}):",
            f'        self.{f.snake()} = "{f.adjective()} {f.noun()} {f.noun()} in {f.phrase()}"',
            f"        self.{f.snake()} = {first}.{f.verb()}_{f.noun()}({second}, {f.snake()})",
            "",
        ]
    return "\n".join(lines)


TEMPLATES: dict[str, Template] = {
    "codec_table": codec_table,
    "accessor_class": accessor_class,
    "unit_tests": unit_tests,
    "descriptor_table": descriptor_table,
    "argument_parser": argument_parser,
    "column_definitions": column_definitions,
    "message_catalogue": message_catalogue,
    "exception_classes": exception_classes,
}


def templated(templates: Mapping[str, Template]) -> JunkKind:
    """The junk kind that mixes ``templates`` in equal parts."""

    def make(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
        shares = np.array_split(np.arange(count), len(templates))
        parts = [_rows(source, template, rng, len(share)) for template, share in zip(templates.values(), shares, strict=True)]
        return np.concatenate(parts)

    return make


def generated_code(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """Machine-written code, (count, length) int32: all of :data:`TEMPLATES` in equal parts."""
    return templated(TEMPLATES)(source, rng, count)


def _rows(source: JunkSource, template: Template, rng: np.random.Generator, count: int) -> Array:
    """``count`` rows cut from the stream of one template's documents; more are drawn until there are enough tokens."""
    length = source.rows.shape[1]
    needed = count * length
    parts: list[Array] = [np.empty(0, np.int32)]
    have = 0
    while have < needed:
        documents: list[str] = []
        missing = CHARACTERS * (needed - have)
        while missing > 0:
            documents.append(template(rng))
            missing -= len(documents[-1])
        stream = source.encode(documents)
        parts.append(stream)
        have += len(stream)
    return np.concatenate(parts)[:needed].reshape(count, length).astype(np.int32)
