"""What the fuzz tests share: how many cases a property gets, what counts as an answer, and wild values."""

import inspect
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from sagan_attn.errors import SaganAttnError

__all__ = ["Refused", "answer", "fuzzed", "huge", "json_values", "named", "wild", "words"]

CASE_SECONDS = 120  # a case that takes longer hangs
FEW = 12
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not in the repository
Refused = SaganAttnError

FAST = settings(derandomize=True)
WIDE = settings(print_blob=True)
COMMON: dict[str, Any] = {
    "database": None,  # which would be a folder in the repository
    "deadline": None,  # measured by `_in_time`, which stops the case
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}


def fuzzed(many: int, few: int = FEW, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A property as two tests: of a few cases that are always the same, and, marked slow, of many.

    Arguments of the property that are no strategies are fixtures; they are the same for all cases of a test. A test
    fails when it ran fewer cases than it says, too.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        fixtures = [name for name in inspect.signature(check).parameters if name not in strategies]

        def test(cases: int, request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
            given_fixtures = {name: request.getfixturevalue(name) for name in fixtures}
            done = 0

            def case(**values: Any) -> None:
                nonlocal done
                with _in_time():
                    check(**given_fixtures, **values)
                done += 1

            profile = FAST if cases == few else WIDE
            settings(profile, max_examples=cases, **COMMON)(given(**strategies)(case))()
            record_property("cases", done)
            assert done >= cases, f"only {done} of {cases} cases were tried: the strategy has no more"

        test.__name__ = test.__qualname__ = check.__name__
        test.__doc__ = check.__doc__
        test.__module__ = check.__module__
        wide = pytest.param(many, id="many", marks=pytest.mark.slow)
        return pytest.mark.parametrize("cases", [pytest.param(few, id="few"), wide])(test)

    return decorate


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"a case took more than {CASE_SECONDS} s:\n{''.join(traceback.format_stack(frame)[-4:])}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(call: Callable[[], Any], *culprits: str) -> Any:
    """What a call gives, or the library's own error, whose message names one of the culprits.

    Any other exception is left alone, and fails the test.
    """
    try:
        return call()
    except SaganAttnError as error:
        named(str(error), *culprits)
        return error


def named(message: str, *culprits: str) -> None:
    """The message says something, in a length somebody reads, and about one of the culprits, if there are any."""
    assert message.strip()
    assert len(message) < 5000, message[:200]
    assert not culprits or any(word in message for word in culprits), f"none of {culprits} in: {message}"


LETTERS = "abcsx019_-+./\\*?[]{}()^$:,;=!&|<>'\"#%@~ \t\n\r\x00\x1bé€\u202e\U0001f600\udcff"
SPECIAL = [
    "",
    "sagan",
    "layer1",
    "../x",
    "a.b",
    "[",
    "*",
    "(",
    "os.system",
    "\x00",
    "null",
    "nan",
    "1e400",
    "cuda",
    "None",
]
words = st.text(st.sampled_from(LETTERS), max_size=8) | st.sampled_from(SPECIAL)
huge = st.sampled_from([2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, -(2**63), -(10**30)])
numbers = st.integers(-3, 9) | st.floats() | st.sampled_from([0.5, 1.0, 2.0, -0.0, 1e308])
plain = st.none() | st.booleans() | numbers | huge | words
json_values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
wild = json_values | st.binary(max_size=4) | st.tuples(plain, plain) | st.builds(object) | st.just(int) | st.just(len)
