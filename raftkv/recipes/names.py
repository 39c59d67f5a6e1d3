"""Where recipes keep their keys: `<name>/.<kind>/...`, so that `raftkv get --prefix NAME/` shows all of one name.

A part of a path that begins with a dot belongs to a recipe. A name has none, so no two recipes, nor a recipe named `a`
and one named `a/b`, can ever see each other's keys.
"""

from __future__ import annotations

from raftkv.client import AsyncClient, ConditionFailed, ConfigError, OutcomeUnknown
from raftkv.client.keys import Text, to_bytes

TRIES_MAX = 20  # of a step that may be repeated when its outcome is unknown


def prefix_of(name: Text, kind: str) -> bytes:
    """`<name>/.<kind>/`.

    Raises:
        ConfigError: the name is empty, ends in "/", or has a part that begins with a dot.
    """
    bare = to_bytes(name, "name")
    if not bare.strip(b"/") or bare.endswith(b"/"):
        raise ConfigError("name", f"{bare!r} must not be empty, nor end in '/'")
    if bare.startswith(b".") or b"/." in bare:
        raise ConfigError("name", f"{bare!r}: no part of it may begin with '.', such parts belong to the recipes")
    return bare + b"/." + kind.encode() + b"/"


async def agree(client: AsyncClient, key: bytes, number: int, field: str) -> None:
    """Write down `number` at `key`, or find it there.

    Raises:
        ConfigError: somebody wrote down another number.
    """
    for attempt in range(TRIES_MAX):
        try:
            await client.put(key, str(number), if_absent=True)
        except ConditionFailed as error:
            found = error.current
            if found is not None and found.value != b"%d" % number:
                text = f"{number} was given, but others use {found.value!r}; delete {key!r} to change it"
                raise ConfigError(field, text) from None
        except OutcomeUnknown:
            if attempt == TRIES_MAX - 1:
                raise
            continue  # whoever writes it writes the same, or we shall see
        return


def check_count(field: str, value: object, maximum: int) -> int:
    """Raise ConfigError unless `value` is a whole number from 1 to `maximum`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise ConfigError(field, f"{value!r} is not a whole number from 1 to {maximum}")
    return value
