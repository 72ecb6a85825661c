"""A save that needs the live objects no more: what a thread hashes and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpcresume import files
from hpcresume.checkpoint import writer
from hpcresume.checkpoint.arena import Image
from hpcresume.checkpoint.manifest import FileEntry, hash_stream

STATE = "state.json"

#: Finds a file of an older checkpoint with the same bytes, of which there are enough copies.
Twin = Callable[[FileEntry], Path | None]


@dataclass(frozen=True)
class Staged:
    """A save that needs the live objects no more."""

    images: list[Image]
    others: dict[str, bytes]
    """What is not tensors, by the file's name."""
    state: Callable[[], bytes]
    """The text of state.json."""
    still: frozenset[str] = frozenset()
    """Files of what is not trained: they may be there already."""
    as_made: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Files that are left out where their digests are these."""

    @property
    def size_bytes(self) -> int:
        """Size of all files, nearly: the tree of a state is small beside its tensors."""
        content = [image.content for image in self.images]
        return sum(map(len, content)) + sum(map(len, self.others.values()))

    @property
    def num_files(self) -> int:
        """How many files it will be."""
        return len(self.images) + len(self.others) + 1

    def write(self, directory: Path, twin: Twin = lambda entry: None) -> list[FileEntry]:
        """Write everything into an empty directory, fsynced. Raises OSError.

        What is not trained is linked instead, where `twin` finds the same bytes.
        """
        entries = []
        for image in self.images:
            digests = None
            if image.name in self.as_made or image.name in self.still:
                digests = hash_stream([image.content])[1]
            if digests is not None and digests == self.as_made.get(image.name):
                continue
            entry = None
            if digests is not None and image.name in self.still:
                same = FileEntry(name=image.name, bytes=len(image.content), chunks=digests)
                entry = _linked(same, twin(same), directory)
            entries.append(entry or writer.write_file(directory / image.name, image.content))
        folders = set()
        for name, content in {**self.others, STATE: self.state()}.items():
            path = directory / name
            if path.parent != directory:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folders.add(path.parent)
            entries.append(replace(writer.write_file(path, content), name=name))
        for folder in folders:
            files.fsync_dir(folder)
        return entries


def _linked(entry: FileEntry, twin: Path | None, directory: Path) -> FileEntry | None:
    """Give a file a second name; None where it has to be written."""
    if twin is None:
        return None
    try:
        os.link(twin, directory / entry.name, follow_symlinks=False)
    except OSError:
        # It may have been removed, and not every file system has links.
        return None
    return entry
