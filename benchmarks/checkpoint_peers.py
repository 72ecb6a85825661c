"""Other ways to save and to load the same tensors: torch, safetensors, distributed checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_payload import forget, settle, timed
from checkpoint_rows import Call
from safetensors.torch import load_file, save_file


class Peers:
    """Saves and loads of tensors by name; each is a call that tells its own seconds."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        self._tensors = dict(tensors)
        self._folder = folder / "peers"
        self._folder.mkdir()

    def by_figure(self) -> dict[str, dict[str, Call]]:
        """The calls by the figure beside which they stand, and by name."""
        loads: dict[str, tuple[Path, Callable[[], Any], Callable[[], Any]]] = {
            "torch.load + copy_": (self._torch, self.torch_save, self.torch_load),
            "safetensors.load_file + copy_": (self._safe, self.safe_save, self.safe_load),
            "dcp.load": (self._dcp, self.dcp_save, self.dcp_load),
        }
        return {
            "stall": {"dcp.async_save": self.dcp_async_save},
            "write": {
                "torch.save + fsync": self.torch_save,
                "safetensors.save_file + fsync": self.safe_save,
                "dcp.save": self.dcp_save,
            },
            "cold": {name: partial(_cold, *load) for name, load in loads.items()},
            "warm": {name: partial(_warm, *load) for name, load in loads.items()},
        }

    @property
    def _torch(self) -> Path:
        return self._folder / "torch.pt"

    @property
    def _safe(self) -> Path:
        return self._folder / "peer.safetensors"

    @property
    def _dcp(self) -> Path:
        return self._folder / "dcp"

    def torch_save(self) -> float:
        """`torch.save`, then fsync."""
        return _durably(self._torch, lambda path: torch.save(self._tensors, path))

    def safe_save(self) -> float:
        """`safetensors.torch.save_file`, then fsync."""
        return _durably(self._safe, lambda path: save_file(self._tensors, path))

    def dcp_save(self) -> float:
        """`dcp.save`, which fsyncs its files itself."""
        _clear(self._dcp)
        _meet(self._folder)
        return timed(lambda: dcp.save({"state": self._tensors}, checkpoint_id=self._dcp))

    def dcp_async_save(self) -> float:
        """Until `dcp.async_save` lets training go on, with the stager that it makes itself."""
        place = self._folder / "async"
        _clear(place)
        _meet(self._folder)
        began = time.perf_counter()
        saving = dcp.async_save({"state": self._tensors}, checkpoint_id=place)
        seconds = time.perf_counter() - began
        saving.result()
        _clear(place)
        return seconds

    def torch_load(self) -> None:
        """`torch.load`, then a copy into the live tensors."""
        self._take_over(torch.load(self._torch, weights_only=True))

    def safe_load(self) -> None:
        """`load_file`, which maps the file, then a copy into the live tensors."""
        self._take_over(load_file(self._safe))

    def dcp_load(self) -> None:
        """`dcp.load`, into the live tensors by itself."""
        _meet(self._folder)
        dcp.load({"state": self._tensors}, checkpoint_id=self._dcp)

    @torch.no_grad()
    def _take_over(self, found: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(found[name])


def _warm(path: Path, save: Callable[[], Any], load: Callable[[], Any]) -> float:
    if not path.exists():
        save()
    return timed(load)


def _cold(path: Path, save: Callable[[], Any], load: Callable[[], Any]) -> float:
    if not path.exists():
        save()
    forget([path])
    return timed(load)


def _durably(path: Path, save: Callable[[Path], object]) -> float:
    _clear(path)

    def write() -> None:
        save(path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    return timed(write)


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    settle(path.parent)


def _meet(folder: Path) -> None:
    """A gloo group of one, which distributed checkpoint asks for."""
    if not dist.is_initialized():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
