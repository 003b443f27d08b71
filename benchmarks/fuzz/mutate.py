"""The byte mutator: a few changes to a file, of the kinds that a fault, a careless edit or an attacker makes."""

from __future__ import annotations

import random
import re

NUMBERS = (0, 1, -1, 2**31, 2**40, 10**12, 2**62, 2**63 - 1)
WORDS: tuple[bytes, ...] = (
    *(number.to_bytes(8, "little", signed=True) for number in NUMBERS),
    *(str(number).encode() for number in NUMBERS),
    b"1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"a"',
    b"1.5",
    b"9" * 5000,
    b"[" * 5000,
    b'{"a":' * 3000,
    b"- " * 3000,
    b'"\\ud800"',
    b"\xff\xfe",
    b"\x00",
    b"PK\x03\x04",
    b"${oc.env:HOME}",
    b"${seed}",
    b"../../../etc/passwd",
    b"&a [*a]",
    b"!!python/object/apply:os.system ['true']",
    b"'|O', ",
    b"\n",
    b",",
)
_NUMBER = re.compile(rb"-?\d+")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one to three changes; half of them in the first 400 bytes, where formats have their headers."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = _changed(data, rng)
    return data


def _changed(data: bytes, rng: random.Random) -> bytes:
    reach = len(data) if rng.random() < 0.5 else min(len(data), 400)
    at = rng.randrange(reach + 1)
    end = min(at + rng.choice((1, 1, 2, 4, 8, 16, rng.randrange(1, len(data) + 2))), len(data))
    how = rng.randrange(11)
    if how == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 1:
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    if how == 2:
        word = rng.choice(WORDS)
        return data[:at] + word + data[at + len(word) :]
    if how == 3:
        return data[:at] + rng.choice(WORDS) + data[at:]
    if how == 4:
        return data[:at] + data[end:]
    if how == 5:
        return data[:end] + data[at:end] + data[end:]
    if how == 6:
        return data[:at]
    if how == 7:
        return data + rng.choice((rng.randbytes(1), rng.randbytes(16), data, b"\0" * 4096))
    if how == 8:
        other = rng.randrange(len(data) + 1)
        return data[:at] + data[other : other + end - at] + data[end:]
    if how == 9 and (found := list(_NUMBER.finditer(data))):
        number = rng.choice(found)
        new = rng.choice((str(int(number[0][:18] or b"0") + rng.choice((-1, 1))).encode(), rng.choice(WORDS)))
        return data[: number.start()] + new + data[number.end() :]
    return data[:at] + b"\0" * (end - at) + data[end:]
