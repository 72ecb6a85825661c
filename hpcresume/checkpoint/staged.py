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
    """What is to be written."""

    images: list[Image]
    others: dict[str, bytes]
    """What is not tensors, by the file's name."""
    state: Callable[[], bytes] | None
    """The text of state.json; None where another rank writes it."""
    arrived: Callable[[], None]
    """Waits until the images are whole."""
    still: frozenset[str] = frozenset()
    """Files of what is not trained: they may be there already."""
    as_made: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Files that are left out where their digests are these."""
    partners: tuple[int, ...] = ()
    """The ranks that write the other shares of this save."""
    links: Mapping[str, tuple[FileEntry, Path]] = field(default_factory=dict)
    """Files that are there already, and where."""

    def beside(self, twin: Twin) -> Staged:
        """The same save without what need not be written: it is as made, or `twin` finds it."""
        self.arrived()
        links, left_out = {}, set()
        for image in self.images:
            if image.name not in self.still and image.name not in self.as_made:
                continue
            if image.digests is None:
                _, image.digests = hash_stream([image.content])
            size = len(image.content)
            if image.digests == self.as_made.get(image.name):
                left_out.add(image.name)
            elif image.name in self.still:
                entry = FileEntry(name=image.name, bytes=size, chunks=image.digests)
                path = twin(entry)
                if path is not None:
                    links[image.name] = (entry, path)
        images = [image for image in self.images if image.name not in left_out]
        return replace(self, images=images, links=links)

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk, nearly.

        The tree of a state is small beside its tensors, and the ranks' shares are about the same.
        """
        content = [image.content for image in self.images if image.name not in self.links]
        return sum(map(len, content)) * (1 + len(self.partners)) + sum(
            map(len, self.others.values())
        )

    @property
    def num_files(self) -> int:
        """How many files it will be."""
        return len(self.images) + len(self.others) + 1

    def write(self, directory: Path) -> list[FileEntry]:
        """Write everything into an empty directory, fsynced. Raises OSError."""
        self.arrived()
        entries = [
            _linked(directory, *self.links.get(image.name, ()))
            or writer.write_file(directory / image.name, image.content)
            for image in self.images
        ]
        folders = set()
        state = {} if self.state is None else {STATE: self.state()}
        for name, content in {**self.others, **state}.items():
            path = directory / name
            if path.parent != directory:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folders.add(path.parent)
            entries.append(replace(writer.write_file(path, content), name=name))
        for folder in folders:
            files.fsync_dir(folder)
        return entries


def _linked(
    directory: Path, entry: FileEntry | None = None, source: Path | None = None
) -> FileEntry | None:
    """Give a file that is there a second name; None where it has to be written."""
    if entry is None or source is None:
        return None
    try:
        os.link(source, directory / entry.name, follow_symlinks=False)
    except OSError:
        # It has been removed meanwhile, or the file system has no links.
        return None
    return entry
