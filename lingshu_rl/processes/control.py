"""What the policy's ranks tell each other beside the update: over CPU connections of their own, for as long as it
takes.

Collectives on the devices have a limit (NCCL: 10 minutes), which finds a rank that hangs. A rank that waits there while
the main one samples, evaluates or writes to a slow disk would run into it, so it waits here. One that dies closes its
connections, which ends the others' wait at once.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from lingshu_rl.processes.workers import address_towards

PATIENCE = timedelta(days=7)  # for what the main rank does alone


class Control:
    """Messages between `count` ranks; alone, it passes values through. All ranks call the same methods in the same
    order."""

    def __init__(self, rank: int, count: int) -> None:
        import torch.distributed as dist

        self.rank, self.count = rank, count
        self.known: Mapping[str, Any] = {}
        # The group's own limit is for connecting, where a firewall should show soon; every wait gets PATIENCE.
        self.group = dist.new_group(backend="gloo") if count > 1 else None

    def know(self, objects: Mapping[str, Any]) -> None:
        """What every rank holds under the `id` it has: messages name it, and the receiver's own object comes out."""
        self.known = objects

    def barrier(self) -> None:
        import torch.distributed as dist

        if self.group is not None:
            dist.barrier(group=self.group, timeout=PATIENCE)

    def share(self, value: Any) -> Any:
        """The main rank's value on every rank."""
        import torch
        import torch.distributed as dist

        if self.group is None:
            return value
        message = self.pack(value) if self.rank == 0 else b""
        self.barrier()
        size = torch.tensor([len(message)])
        dist.broadcast(size, 0, group=self.group)
        body = (
            torch.frombuffer(bytearray(message), dtype=torch.uint8)
            if message
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(body, 0, group=self.group)
        return value if self.rank == 0 else self.unpack(body.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        import torch.distributed as dist

        if self.group is None:
            return [value]
        found = [None] * self.count
        self.barrier()
        dist.all_gather_object(found, value, group=self.group)
        return found

    def pack(self, value: Any) -> bytes:
        """The message that `share` sends."""
        out = io.BytesIO()
        _Pickler(out, self.known).dump(value)
        return out.getvalue()

    def unpack(self, message: bytes) -> Any:
        return _Unpickler(io.BytesIO(message), self.own).load()

    def own(self, name: str) -> Any:
        """What this rank holds under a name that the main one used."""
        if name not in self.known:
            raise LookupError(
                f"this rank has not loaded {name!r}, which the main one has: the nodes' data files differ"
            )
        return self.known[name]


def _own(name: str) -> Any:
    """Stands in a message for what the receiver holds under this name."""
    raise NotImplementedError


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO, known: Mapping[str, Any]) -> None:
        super().__init__(out, protocol=pickle.HIGHEST_PROTOCOL)
        self.known = known

    def reducer_override(self, thing: Any) -> Any:
        name = getattr(thing, "id", None)
        same = isinstance(name, str) and name in self.known and self.known[name] == thing
        return (_own, (name,)) if same else NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, message: io.BytesIO, own: Callable[[str], Any]) -> None:
        super().__init__(message)
        self.own = own

    def find_class(self, module: str, name: str) -> Any:
        return self.own if (module, name) == (__name__, _own.__name__) else super().find_class(module, name)


def use_route_to_main() -> None:
    """Let gloo use the network interface over which this rank reaches MASTER_ADDR, unless GLOO_SOCKET_IFNAME names one.

    By itself gloo takes the address that the host's own name resolves to, on many machines one that others cannot
    reach.
    """
    import psutil

    own = address_towards(os.environ["MASTER_ADDR"])
    for interface, addresses in psutil.net_if_addrs().items():
        if own in (address.address.split("%")[0] for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
