"""Words of findings that several checks share."""

from __future__ import annotations

from collections.abc import Sequence

from hpcresume.scheduler.doctor.facts import Finding, good, warning

ASK_ADMIN = "ask the administrators"
#: Clocks that differ by more than the lead time's margin eat it up.
WIDEST_SKEW_S = 5.0


def clock(name: str, whose: str, skew_s: float, *, harm: str, remedy: str = "") -> Finding:
    """Whether a clock agrees with this machine's; `skew_s` is by how much it is ahead.

    `harm` is what a difference does, `remedy` what helps until clocks are synchronised.
    """
    if abs(skew_s) > WIDEST_SKEW_S:
        side = "ahead of" if skew_s > 0 else "behind"
        return warning(
            name,
            f"{whose} is {abs(skew_s):.1f} s {side} this machine's: {harm}",
            f"{ASK_ADMIN} to synchronise clocks" + (f"; until then {remedy}" if remedy else ""),
        )
    return good(name, f"{whose} agrees with this machine's to {max(abs(skew_s), 0.05):.2g} s")


def listed(names: Sequence[str]) -> str:
    """As in: a, b."""
    return ", ".join(names)


def counted(number: int, word: str) -> str:
    """As in: 1 job, 2 jobs."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def names_counted(names: tuple[str, ...]) -> str:
    """As in: 4 x NVIDIA H100."""
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def dotted(version: tuple[int, int]) -> str:
    """(20, 11) as 20.11."""
    return f"{version[0]}.{version[1]:02d}"
