"""The story of a run as it grows: a second look reads only what has come since the first."""

from __future__ import annotations

from hpcresume.journal import LinkRecords, Record, in_order, is_record, read_claim, read_link
from hpcresume.observe.growing import GrowingLines
from hpcresume.run_dir import RunDir
from hpcresume.story import Story, cancelled_by


class StoryTail:
    """`story.read_story`, again and again.

    A link that another one has followed never changes for its readers, so that only the newest
    link's journals are looked at.
    """

    def __init__(self, run: RunDir) -> None:
        """Raises NotFound where it is no run."""
        self._run = run
        self._run_id = run.identify()["id"]
        self._submitted = GrowingLines(run.submissions)
        self._submissions: list[Record] = []
        self._followed: dict[int, LinkRecords] = {}
        self._newest: _NewestLink | None = None

    def look(self) -> Story:
        """The story as it is now."""
        self._submissions += filter(is_record, self._submitted.look())
        numbers = self._run.link_numbers()
        for number in numbers[:-1]:
            if number not in self._followed:
                # Read anew: of what was seen while it was the newest, not all may be adopted.
                self._followed[number] = read_link(self._run, number)
        links = [self._followed[number] for number in numbers[:-1]]
        if numbers:
            if self._newest is None or self._newest.number != numbers[-1]:
                self._newest = _NewestLink(self._run, numbers[-1])
            links.append(self._newest.look())
        cancelled = cancelled_by(self._run)
        return Story(self._run, self._run_id, links, list(self._submissions), cancelled)


class _NewestLink:
    """The journals of a link that nobody has followed yet."""

    def __init__(self, run: RunDir, number: int) -> None:
        self.number = number
        link = run.link(number)
        self._writers = [
            (GrowingLines(path), list[Record]()) for path in (link.journal, link.training)
        ]
        self._seen = LinkRecords(number, read_claim(link))

    def look(self) -> LinkRecords:
        """Its records so far; the same object as before where nothing has come."""
        grown = False
        for lines, records in self._writers:
            before = len(records)
            records.extend(filter(is_record, lines.look()))
            grown |= len(records) > before
        if grown:
            merged = in_order(records for _, records in self._writers)
            self._seen = LinkRecords(self.number, self._seen.claim, merged)
        return self._seen
