"""Templates of machine-written code that no tuning may see: other forms and words than :mod:`grace_ds_quickstart.generated` has.

Real machine-written text, which is another held-out kind, stands in :mod:`benchmarks.selection.texts`.
"""

from __future__ import annotations

import numpy as np
from grace_ds_quickstart.generated import Fields, Template

_NOUNS = """
account answer array bit body bound bucket case cell chain channel choice chunk client clock codec column condition connection
constant cookie counter cursor delay depth descriptor digest directory document environment exception expression extension factory
feature field filter flag folder future generator grammar graph guard identifier iterator kind label language layer length library
limit locale machine manager mapping marker mask member memory namespace network offset operation operator package packet pair
parameter password pattern payload pipe platform pointer policy precision priority property protocol proxy reader record reference
region register registry release reply report request resource response sample scale scope script segment semaphore separator
sequence session signal signature slot socket status step style subject suffix symbol system target task template term title tool
total transport tree update variable view weight worker writer zone
"""
_VERBS = """
accept apply begin change clean clear collect compare compute connect convert create delete detach drop emit enter expand
fetch fill flush generate iterate merge move notify poll push query receive record reload resolve restore scan select
skip split submit swap transform update validate visit walk
"""
_ADJECTIVES = """
absolute abstract allowed anonymous atomic available basic common compact complete constant dead direct dynamic exact
explicit external fast foreign free generic hidden implicit initial large latest lazy legal logical long lower mixed modern
physical plain possible previous primary proper readable relative safe same second secure separate shared silent similar small
stable standard strong temporary true unique unknown unused upper useful virtual visible weak whole
"""
WORDS = tuple(tuple(words.split()) for words in (_NOUNS, _VERBS, _ADJECTIVES))


def enumeration(rng: np.random.Generator) -> str:
    """Named constants with their values."""
    f = Fields(rng, WORDS)
    lines: list[str] = []
    for _ in range(f.number(2, 4)):
        lines += ["@unique", f"class {f.camel()}(IntEnum):", ""]
        value = f.number(0, 50)
        for name in f.distinct(f.number(8, 16), 3):
            value += f.number(1, 4)
            lines.append(f"    {name} = {value}  #: {f.verb()} {f.adjective()} {f.noun()} or {f.noun()} {f.noun()}")
        lines += ["", ""]
    return "\n".join(lines)


def migration(rng: np.random.Generator) -> str:
    """The steps from one version of a database to the next, and back."""
    f = Fields(rng, WORDS)
    steps = [(f.snake(), f.snake(3)) for _ in range(f.number(7, 16))]
    lines = [f'revision = "{f.number(1000, 9999)}_{f.snake(3)}"', "", "", "def upgrade(op):"]
    for table, column in steps:
        if f.chance(0.5):
            kind = f"{f.one_of(('Text', 'Int', 'Date', 'Float'))}({f.literal()})"
            lines.append(f"    op.alter({table!r}, {column!r}, {kind}, {f.snake(3)!r})  # {f.adjective()} {f.noun()}")
        else:
            lines.append(f"    op.index({f.snake(3)!r}, {table!r}, [{column!r}, {f.snake()!r}])  # {f.verb()} {f.phrase()}")
    lines += ["", "", "def downgrade(op):"]
    lines += [f"    op.drop({table!r}, {f.snake(3)!r}, {f.snake(3)!r})" for table, _ in reversed(steps)]
    return "\n".join([*lines, ""])


def client_stub(rng: np.random.Generator) -> str:
    """The methods of a client, one for each address of a server."""
    f = Fields(rng, WORDS)
    lines: list[str] = []
    for _ in range(f.number(5, 11)):
        first, second = f.distinct(2, 2)
        method = f.one_of(("get", "put", "post", "delete"))
        lines += [
            f"    async def {f.verb()}_{f.snake()}(self, *, {first}: str, {second}: int | None = None) -> {f.camel()}:",
            f'        """{f.verb().title()} {f.phrase()} by {f.phrase()}."""',
            f'        url = f"/{f.noun()}/{f.noun()}/{{{first}}}/{f.snake()}"',
            f'        query = {{"{f.snake()}": {second}, "{f.noun()}": {f.literal()}}}',
            f"        return await self.{f.noun()}.{method}(url, query, {f.snake()})",
            "",
        ]
    return "\n".join(lines)


def action_table(rng: np.random.Generator) -> str:
    """The actions of a parser by state and symbol."""
    f = Fields(rng, WORDS)
    lines = [f"# States of the grammar {f.snake(3)}.", f"def fill_{f.snake()}(state):"]
    number = f.number(0, 90)
    for _ in range(f.number(14, 30)):
        number += f.number(1, 3)
        if f.chance(0.5):
            action = f"reduce({f.snake(3)})  # {f.noun()} {f.noun()} -> {f.adjective()} {f.noun()} {f.noun()}"
        else:
            action = f"shift({f.snake(3)}, {f.verb()}_{f.noun()})  # {f.verb()} {f.adjective()} {f.noun()}"
        lines.append(f"    state[{number}, {f.snake()}] = {action}")
    return "\n".join([*lines, ""])


def dataclass_schema(rng: np.random.Generator) -> str:
    """Records with the types, defaults and other names of their fields."""
    f = Fields(rng, WORDS)
    lines: list[str] = []
    for _ in range(f.number(2, 4)):
        lines += ["@dataclass(slots=True)", f"class {f.camel(3)}:"]
        for name in f.distinct(f.number(6, 12), 2):
            kind = f.one_of(("int", "str", "bool", f"list[{f.camel()}]", f"{f.camel()} | None"))
            lines.append(f"    {name}: {kind} = field(default={f.literal()}, alias={f.snake(3)!r}, text={f.phrase()!r})")
        lines += ["", ""]
    return "\n".join(lines)


def insert_fixture(rng: np.random.Generator) -> str:
    """Rows put into a database before a test."""
    f = Fields(rng, WORDS)
    lines = [f"def load_{f.snake()}(cursor):"]
    for _ in range(f.number(8, 18)):
        names = ", ".join(f.distinct(3, 2))
        lines += [
            f'    cursor.execute("INSERT INTO {f.snake()} ({names}) VALUES (?, ?, ?)",',
            f"        ({f.literal()}, '{f.adjective()} {f.noun()} {f.noun()} for {f.noun()}', {f.snake()}.{f.snake()}))",
        ]
    return "\n".join([*lines, ""])


def ctypes_binding(rng: np.random.Generator) -> str:
    """The functions of a C library with the types of their arguments."""
    f = Fields(rng, WORDS)
    prefix = f.noun()
    lines = [f"lib = load_library({f.snake()!r}, version={f.number(1, 20)})", ""]
    for _ in range(f.number(8, 15)):
        name = f"{prefix}_{f.verb()}_{f.snake()}"
        kinds = ", ".join(f.one_of(("c_int", "c_char_p", "c_size_t", f"POINTER({f.camel()})")) for _ in range(f.number(1, 4)))
        lines += [
            f"# int {name}({f.noun()} *{f.snake()}, {f.noun()} {f.snake()}): {f.verb()} {f.phrase()} by {f.phrase()}",
            f"{f.verb()}_{f.snake(3)} = lib.bind({name!r}, [{kinds}], {f.verb()}_{f.snake(3)})",
        ]
    return "\n".join([*lines, ""])


def feature_flags(rng: np.random.Generator) -> str:
    """The switches of a product with their owners and what they are for."""
    f = Fields(rng, WORDS)
    lines = ["from . import registry", "", f"flags = registry.section({f.snake()!r})"]
    for _ in range(f.number(9, 20)):
        lines += [
            f"flags.{f.verb()}_{f.snake(3)} = switch({f.snake()}.{f.noun()}, {f.literal()}, {f.snake(3)!r},",
            f"    note='{f.verb()} {f.phrase()} with {f.phrase()}')",
        ]
    return "\n".join([*lines, ""])


HELD_OUT: dict[str, Template] = {
    "enumeration": enumeration,
    "migration": migration,
    "client_stub": client_stub,
    "action_table": action_table,
    "dataclass_schema": dataclass_schema,
    "insert_fixture": insert_fixture,
    "ctypes_binding": ctypes_binding,
    "feature_flags": feature_flags,
}
