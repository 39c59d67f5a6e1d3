"""The LevelDB binding: plyvel-next where it has wheels (Python 3.12 and later), plyvel elsewhere.

The two differ in nothing but their name, so everything else imports `leveldb` from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plyvel as leveldb  # typed by typings/plyvel.pyi
else:
    try:
        import plyvel_next as leveldb
    except ImportError:
        import plyvel as leveldb

__all__ = ["leveldb"]
