"""An object store that several processes share, under shared://: nothing in it is renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

PROTOCOL = "shared"


class SharedStore(LocalFileSystem):
    protocol = PROTOCOL
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{PROTOCOL}://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"{PROTOCOL}://{self._strip_protocol(name)}"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return super()._open(path, mode, **options | {"autocommit": True})

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """As a store does it: readers see the old or the new."""
        there = Path(self._strip_protocol(path))
        fresh = there.with_name(f"put-{os.getpid()}")
        fresh.write_bytes(value)
        fresh.replace(there)

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store renames nothing")


def register() -> None:
    fsspec.register_implementation(PROTOCOL, SharedStore, clobber=True)
