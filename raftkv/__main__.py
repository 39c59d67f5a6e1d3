"""`python -m raftkv` is the command `raftkv`; supervisors start nodes this way."""

from __future__ import annotations

from raftkv.local import lifeline

lifeline.attach()  # before anything slow is imported: from here on the process ends with its supervisor

from raftkv.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
