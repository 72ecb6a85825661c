"""What is said around the tests to programs like ours is not said to the tests.

A job, a launcher, a shell or a site says in the environment which rank this is, where runs lie, or
that there are colours. Imported for its effect, before anything takes a copy of the environment.
"""

from __future__ import annotations

import os

from slurm_cluster import CLIENTS

_PREFIXES = ("HPCRESUME_", *CLIENTS)
_NAMES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
        *("MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"),
        *("VIRTUAL_ENV", "CONDA_DEFAULT_ENV"),
    }
)

for _name in [name for name in os.environ if name.startswith(_PREFIXES) or name in _NAMES]:
    del os.environ[_name]
# Otherwise the site's file is read.
os.environ["HPCRESUME_SITE"] = os.devnull
