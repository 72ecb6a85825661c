"""`hpcresume checkpoints`: what a run has saved, whether it is whole, and what may go."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence

import click

from hpcresume import files
from hpcresume.checkpoint import disk, images, retention
from hpcresume.checkpoint.listing import Listing, list_checkpoints
from hpcresume.checkpoint.manifest import Committed
from hpcresume.cli.options import chosen_run, run_argument, runs_option
from hpcresume.config import read_frozen
from hpcresume.display.checkpoints import checkpoints_table, steps_in_words
from hpcresume.display.reading import Reading, Say, reading
from hpcresume.display.terminal import styled, wrapped
from hpcresume.errors import CheckpointError, NotFound, RunLive, UsageError, unavailable
from hpcresume.run_dir import RunDir
from hpcresume.story import live_jobs, read_story, user_name

SCHEMA_VERSION = 1
_ALL = "all"


@click.command()
@run_argument
@click.option(
    "--verify",
    metavar="[STEP]",
    is_flag=False,
    flag_value=_ALL,
    help="Read every byte of all checkpoints, or of STEP. Exit code 7 where one is damaged.",
)
@click.option("--prune", is_flag=True, help="Remove what the run's policy lets go.")
@click.option("--dry-run", is_flag=True, help="With --prune: only say what would go.")
@click.option("--pin", metavar="STEP", type=int, help="Keep that checkpoint, whatever comes.")
@click.option("--unpin", metavar="STEP", type=int, help="Leave it to the policy again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@runs_option
def checkpoints(
    run: str | None,
    verify: str | None,
    prune: bool,
    dry_run: bool,
    pin: int | None,
    unpin: int | None,
    as_json: bool,
    runs: str | None,
) -> int:
    """List the checkpoints of RUN: what each holds, why it stays, what the run will need.

    \b
    Examples:
      hpcresume checkpoints
      hpcresume checkpoints toy --verify
      hpcresume checkpoints toy --pin 5000
    """
    if verify is not None and verify != _ALL and not verify.isdecimal() and run is None:
        # `--verify RUN`: click takes the next word for the option's value.
        run, verify = verify, _ALL
    _check_usage(verify, prune=prune, dry_run=dry_run, pin=pin, unpin=unpin)
    chosen = chosen_run(run, runs)
    if not as_json:
        # Said before the checkpoints are looked at, which may take a slow file system its time.
        click.echo(str(chosen.path))

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    if pin is not None:
        _pin(chosen, pin, say)
    if unpin is not None:
        _unpin(chosen, unpin, say)
    listing = _look(chosen)
    bar = not as_json and sys.stdout.isatty()
    checked: dict[int, str] = {}
    going: list[int] = []
    if verify is not None:
        checked = _verify(listing, verify, say, bar=bar)
    elif prune:
        going = _prune(listing, dry_run=dry_run, say=say, bar=bar)
        if as_json and not dry_run:
            listing = _look(chosen)
    if as_json:
        acts = {"would_remove" if dry_run else "removed": going}
        document = {"schema_version": SCHEMA_VERSION, **listing.to_json(checked), **acts}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    elif not prune and verify is None and pin is None and unpin is None:
        click.echo(checkpoints_table(listing))
    return CheckpointError.exit_code if any(checked.values()) else 0


def _check_usage(
    verify: str | None, *, prune: bool, dry_run: bool, pin: int | None, unpin: int | None
) -> None:
    asked = [verify is not None, prune, pin is not None, unpin is not None]
    if sum(asked) > 1:
        raise UsageError("Of --verify, --prune, --pin and --unpin, give one at a time.")
    if dry_run and not prune:
        raise UsageError("--dry-run goes with --prune.")
    if verify is not None and verify != _ALL and not verify.isdecimal():
        raise UsageError(f"--verify takes the step of a checkpoint, not '{verify}'.")


def _look(run: RunDir) -> Listing:
    settings = read_frozen(run.config).checkpoint
    return list_checkpoints(run, settings, complete=read_story(run).completed)


def _named(listing: Listing, step: int) -> NotFound:
    """What is said of a step that has no checkpoint."""
    there = steps_in_words([found.step for found in listing.found]) or "none"
    return NotFound(f"{listing.run.name} has no checkpoint of step {step} (there: {there}).")


# ---- pins --------------------------------------------------------------------------------


def _pin(run: RunDir, step: int, say: Say) -> None:
    """Let a checkpoint stay for good. Raises NotFound where there is none."""
    listing = _look(run)
    if all(found.step != step for found in listing.found):
        raise _named(listing, step)
    files.write_json(run.pin(step), {"by": user_name(), "t": round(time.time(), 3)})
    if not run.checkpoint(step).is_dir():
        # A link that is alive was just removing it.
        run.pin(step).unlink(missing_ok=True)
        raise _named(_look(run), step)
    say(
        f"{run.checkpoint(step).name} is pinned: it stays until "
        f"`hpcresume checkpoints {run.name} --unpin {step}`."
    )


def _unpin(run: RunDir, step: int, say: Say) -> None:
    try:
        run.pin(step).unlink()
    except FileNotFoundError:
        pinned = steps_in_words(run.pinned_steps()) or "none"
        raise NotFound(f"Step {step} of {run.name} is not pinned (pinned: {pinned}).") from None
    files.fsync_dir(run.path)
    say(f"{run.checkpoint(step).name} is not pinned any more; the policy decides.")


# ---- verify ------------------------------------------------------------------------------


def _verify(listing: Listing, which: str, say: Say, *, bar: bool) -> dict[int, str]:
    """Read all that is asked for; what is wrong, by step, empty where nothing is. Changes nothing.

    Raises NotFound where the step that is named has no checkpoint.
    """
    asked = listing.found
    broken = {step: listing.left_out[step] for step in sorted(listing.broken)}
    if which != _ALL:
        asked = [found for found in asked if found.step == int(which)]
        broken = {step: reason for step, reason in broken.items() if step == int(which)}
        if not asked and not broken:
            raise _named(listing, int(which))
    names = [listing.run.checkpoint(step).name for step in [*broken, *(f.step for f in asked)]]
    width = max(map(len, names), default=0)

    checked: dict[int, str] = {}
    total_bytes = sum(found.manifest.payload_bytes for found in asked)
    with reading(total_bytes, say, bar=bar) as now:

        def tell(step: int, word: str, style: str, more: str) -> None:
            name = listing.run.checkpoint(step).name
            now.say(f"{name:<{width}}  {styled(f'{word:<8}', style)}  {more}")

        for step, reason in broken.items():
            checked[step] = reason
            tell(step, "damaged", "bad", reason)
        for found in asked:
            began = time.monotonic()
            damage = _damage(found, now)
            if damage and not found.path.exists():
                tell(found.step, "gone", "dim", "removed while it was read")
                continue
            checked[found.step] = damage
            if damage:
                tell(found.step, "damaged", "bad", damage)
                continue
            size = files.size_words(found.manifest.payload_bytes)
            seconds = time.monotonic() - began
            tell(found.step, "verified", "good", f"{size} in {seconds:.1f} s")
    say(wrapped(_verdict(checked)))
    return checked


def _verdict(checked: dict[int, str]) -> str:
    damaged = [step for step, reason in checked.items() if reason]
    if not checked:
        return "There is no checkpoint to verify."
    if not damaged:
        number = len(checked)
        return (
            f"{number} checkpoint{'s are' if number > 1 else ' is'} as written, to the last byte."
        )
    return (
        f"{len(damaged)} of {len(checked)} damaged; nothing was changed. A link that comes upon a "
        f"damaged checkpoint puts it aside and takes the next older one."
    )


def _damage(found: Committed, reading: Reading) -> str:
    """What is wrong with a checkpoint's bytes; empty where they are as written."""
    for entry in found.manifest.files:
        reading.has_read(found.path.name, 0)
        alone = dataclasses.replace(found.manifest, files=(entry,))
        try:
            images.verify(Committed(found.path, alone))
        except CheckpointError as error:
            return str(error)
        reading.has_read(found.path.name, entry.bytes)
    return ""


# ---- prune -------------------------------------------------------------------------------


def _prune(listing: Listing, *, dry_run: bool, say: Say, bar: bool) -> list[int]:
    """Remove what the policy lets go; the steps, or those that would go.

    Raises RunLive, and CheckpointError where the newest checkpoint is damaged: then the older ones
    may be needed, and all stay.
    """
    run = listing.run
    going = listing.to_remove()
    if not dry_run:
        where = live_jobs(run, os.environ)
        if where:
            raise RunLive(
                f"{run.name} is live: {where}. After each save it removes what may go by itself."
            )
    if not going:
        say(wrapped(f"Nothing may go: {_reasons(listing)}."))
        return []
    sizes = {found.step: found.manifest.payload_bytes for found in listing.found}
    if dry_run:
        for step in going:
            say(f"would remove {run.checkpoint(step).name} ({files.size_words(sizes[step])})")
        freed = files.size_words(sum(sizes[step] for step in going))
        say(wrapped(f"{freed} would be free again; {_reasons(listing)}."))
        return going
    newest = listing.found[-1]
    with reading(newest.manifest.payload_bytes, say, bar=bar) as now:
        damage = _damage(newest, now)
    if damage:
        raise CheckpointError(
            f"{newest.path.name} is damaged: {damage}. It is the newest, so the older ones may be "
            f"needed, and nothing is removed; `hpcresume resume {run.name}` puts it aside."
        )
    # Asked again: the newest may have taken long to read, and a pin may have come.
    going = retention.to_remove(
        listing.manifests, listing.policy, pinned=run.pinned_steps(), verified={newest.step}
    )
    removed, refused = _remove(run, going, sizes, say)
    freed = files.size_words(sum(sizes[step] for step in removed))
    say(wrapped(f"{freed} are free again; {newest.path.name} was verified first."))
    if refused is not None:
        raise unavailable(refused)
    return removed


def _remove(
    run: RunDir, going: Sequence[int], sizes: dict[int, int], say: Say
) -> tuple[list[int], OSError | None]:
    """Remove checkpoints; those that are gone, and what refused the last of the others."""
    removed, refused = [], None
    for step in going:
        try:
            disk.remove(run, step)
        except OSError as error:
            refused = error
            continue
        removed.append(step)
        say(f"removed {run.checkpoint(step).name} ({files.size_words(sizes[step])})")
    return removed, refused


def _reasons(listing: Listing) -> str:
    """What stays, and by which rules."""
    kept = listing.kept()
    if not kept:
        return "there is no checkpoint"
    rules = {
        "last": f"keep_last {listing.policy.last}",
        "best": f"keep_best {listing.policy.best}",
        "every": f"keep_every {listing.policy.every}",
        "pinned": "pinned",
    }
    used = [words for name, words in rules.items() if any(name in why for why in kept.values())]
    stay = "stays" if len(kept) == 1 else "stay"
    return f"{len(kept)} {stay} ({', '.join(used)})"
