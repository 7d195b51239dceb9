"""Configs as people get them wrong: a key left out, misspelt or nested wrongly, another kind of value, damaged text."""

import copy
from collections.abc import Iterator
from typing import Any

from fuzzing import json_values, words
from hypothesis import strategies as st

__all__ = ["damaged", "mutated"]

Place = tuple[Any, Any]  # a mapping or list, and the key or index in it


def _places(value: Any) -> Iterator[Place]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


@st.composite
def mutated(
    draw: st.DrawFn, content: Any, values: st.SearchStrategy[Any], keys: st.SearchStrategy[str], changes: int = 2
) -> Any:
    """A copy of the content with up to so many changes; values and keys: beside those of any kind."""
    content = copy.deepcopy(content)

    def value() -> Any:
        return copy.deepcopy(draw(draw(st.sampled_from([values, json_values]))))  # to be changed itself later

    for _ in range(draw(st.integers(1, changes))):
        places = list(_places(content))
        if not places:
            break
        place, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["drop", "add", "rename", "replace", "replace", "replace", "nest", "list", "same"]))
        if kind == "drop":
            del place[key]
        elif kind == "nest":
            place[key] = {draw(keys | words): place[key]}
        elif kind == "list":
            place[key] = [place[key]] * draw(st.integers(0, 2))
        elif kind == "same":
            place[key] = copy.deepcopy(draw(st.sampled_from([p[k] for p, k in places])))
        elif kind == "replace" or not isinstance(place, dict):
            place[key] = value()
        elif kind == "add":
            place[draw(draw(st.sampled_from([keys, words])))] = value()
        else:
            place[draw(draw(st.sampled_from([keys, words])))] = place.pop(key)
    return content


PIECES = [
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\t",
        b"\n",
        b": ",
        b"- ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"'",
        b'"',
        b"#",
        b"&a ",
    ),
    *(
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system [true]",
        b"!!binary x",
        b"1e999",
        b"9" * 5000,
        b"NaN",
        b".nan",
    ),
    *(
        b"null",
        b"-1",
        b"---\n",
        b"...\n",
        b"? ",
        b"| ",
        b"2001-01-01",
        b"0x",
        b"[" * 3000,
        b"{a: " * 3000,
        b"\xed\xa0\x80",
    ),
]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes cut short, with bits turned, or pieces put in, left out or doubled; or none of them."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 64])))
        kind = draw(st.sampled_from(["cut", "turn", "insert", "insert", "leave", "double", "noise", "swap"]))
        if kind == "cut":
            data = data[:start]
        elif kind == "turn" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
        elif kind == "insert":
            data = data[:start] + draw(st.sampled_from(PIECES)) + data[end:]
        elif kind == "leave":
            data = data[:start] + data[end:]
        elif kind == "double":
            data = data[:end] + data[start:]
        elif kind == "noise":
            data = data[:start] + draw(st.binary(max_size=16)) + data[end:]
        elif kind == "swap":
            data = data[end:] + data[:end]
    return data
