"""What blocking twins must have in common with what they stand for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection


def public_names(of: type) -> set[str]:
    """Methods, properties, and what instances are given when they are made."""
    names = {name for name in dir(of) if not name.startswith("_")}
    for cls in of.__mro__[:-1]:
        if "__init__" in vars(cls) and cls.__module__.startswith("raftkv."):
            names.update(re.findall(r"self\.([a-z]\w*)(?:: [^=]*)? = ", inspect.getsource(cls.__init__)))  # type: ignore[misc]
    return names


def check_twins(blocking: type, twin: type, left_out: Collection[str] = ()) -> None:
    """Every public name of `twin` but `left_out` is one of `blocking`, and methods take the same parameters."""
    names = public_names(twin)
    assert names >= set(left_out), "left out is what there is"
    names -= set(left_out)
    assert names - public_names(blocking) == set()
    for name in sorted(names):
        theirs, ours = getattr(twin, name, None), getattr(blocking, name, None)
        if inspect.isroutine(theirs):
            expected = list(inspect.signature(theirs).parameters.values())
            assert list(inspect.signature(ours).parameters.values()) == expected, name  # type: ignore[arg-type]
