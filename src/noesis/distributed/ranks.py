"""The ranks of a process group: who is there, and what they send each other.

Before anything is sent, all ranks check in with the store that `init_process_group` made. So one that is gone is an
error with its name, on every backend and every rank, and no hang.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from .. import files
from ..errors import BadType, BadValue, NoesisError, TimedOut, WrongState
from ..internals import device_kinds, rendezvous

if TYPE_CHECKING:
    pass


#: Of a meeting: how many came, and whether it takes place.
KEYS = ("arrived", "verdict")
#: Between two looks at the store, in seconds: a thousand ranks are not to keep it busy.
LONGEST_PAUSE = 0.2


class Ranks:
    """The ranks of a process group: who is there, and what they send each other.

    Raises:
        NoesisError: when this is no group that this process is in, or the timeout is no time.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            outside = dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER
            here = "a group that this process is not in" if outside else repr(group)
            raise BadType(f"group={here}", "a torch.distributed.ProcessGroup", "Pass torch.distributed.group.WORLD")
        if not 0 < timeout < 1e9:
            raise BadValue(f"timeout={timeout!r}", "seconds to wait for the other ranks", "Pass timeout=60")
        self.group = group
        self.timeout = timeout
        self.members = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self.members)
        kinds = device_kinds(group)
        self.device = torch.device("cpu" if "cpu" in kinds else kinds[0])  # the current one of its kind

    def check_in(self, what: str) -> None:
        """Wait until all ranks are here, for the same purpose.

        Raises:
            NoesisError: when some are not there in time, by number.
        """
        try:
            store = rendezvous()
            if store is not None:  # without it, collectives time out by themselves
                self._meet(store, f"noesis/{self.group.group_name}", what)
        except NoesisError:
            raise
        except RuntimeError as error:
            raise WrongState(
                f"The store of the process group does not answer ({_first_line(error)})",
                "the process that holds it, which is rank 0 or torchrun, to be alive",
                "Look at the logs of rank 0",
            ) from None

    def _meet(self, store: Any, prefix: str, what: str) -> None:
        number = store.add(f"{prefix}/calls/{self.rank}", 1)
        at = [f"{prefix}/{number}/{rank}" for rank in range(self.size)]
        arrived, verdict = (f"{prefix}/{number}/{key}" for key in KEYS)
        store.set(at[self.rank], what)
        # One verdict for all: either the last rank came first, or the first that would wait no longer.
        if store.add(arrived, 1) == self.size:
            store.compare_set(verdict, "", "go")
        # Not `store.wait`, which among many clients was seen to take 5 or 10 s more than its timeout.
        end, pause = time.monotonic() + self.timeout, 0.001
        while not store.check([verdict]):
            if time.monotonic() > end:
                missing = _absent(store, at, list(range(self.size)))
                store.compare_set(verdict, "", json.dumps(missing) if missing else "go")
                break
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        said = store.get(verdict).decode()
        if said != "go":
            raise self._timed_out(json.loads(said), what)
        calls = [text.decode() for text in store.multi_get(at)]
        if number > 1:  # nobody looks there any more
            for key in [self.rank, *(KEYS if self.rank == 0 else ())]:
                store.delete_key(f"{prefix}/{number - 1}/{key}")
        others = [rank for rank in range(self.size) if calls[rank] != what]
        if others:
            raise WrongState(
                f"This rank calls {what}, and {named([self.members[rank] for rank in others])} {calls[others[0]]}",
                "the same call with group= on all ranks",
                "Call them in the same order on each",
            )

    def _timed_out(self, missing: list[int], what: str) -> TimedOut:
        how = f"did not come in time to {what}"
        if self.rank in missing:
            missing, how = [self.rank], f"came to {what} after others had given up"
        return TimedOut(
            f"{named([self.members[rank] for rank in missing]).capitalize()} of {dist.get_world_size()} {how}",
            "every rank of the group to make this call",
            f"See whether they died, left the loop early or are slow; timeout={self.timeout:g} may be longer",
        )

    def tell(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank has to say, in JSON."""
        text = as_bytes(files.dump_json(value))
        lengths = self.gather(np.array([len(text)]))[:, 0]
        told = self.gather(np.pad(text, (0, int(lengths.max()) - len(text))))
        return [json.loads(row[:length].tobytes()) for row, length in zip(told, lengths, strict=True)]

    def gather(self, array: NDArray[Any]) -> NDArray[Any]:
        """Arrays of one shape, of all ranks [ranks, ...]."""
        if not array.size:
            return np.zeros((self.size, *array.shape), array.dtype)
        with _unbroken(self.size):
            tensor = torch.from_numpy(np.array(array)).to(self.device)
            gathered = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(gathered, tensor, group=self.group)
            return np.stack([found.cpu().numpy() for found in gathered])

    def blobs(self, blob: bytes, keep: bool = True) -> Iterator[bytes]:
        """Bytes of any length, of each rank in turn; nothing of them where they are not to be kept."""
        lengths = self.gather(np.array([len(blob)]))[:, 0]
        for rank, length in enumerate(lengths.tolist()):
            own = np.frombuffer(blob, np.uint8) if rank == self.rank else np.zeros(length, np.uint8)
            with _unbroken(self.size):
                tensor = torch.from_numpy(np.array(own)).to(self.device)
                if length:
                    dist.broadcast(tensor, self.members[rank], group=self.group)
                found = tensor.cpu().numpy().tobytes() if keep else b""
            yield found


def _absent(store: Any, keys: list[str], ranks: list[int]) -> list[int]:
    """Those of some ranks whose keys are not there, by halves, since nearly all are."""
    if store.check([keys[rank] for rank in ranks]):
        return []
    if len(ranks) == 1:
        return ranks
    middle = len(ranks) // 2
    return _absent(store, keys, ranks[:middle]) + _absent(store, keys, ranks[middle:])


@contextmanager
def _unbroken(size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WrongState(
            f"Gathering over {size} ranks broke off ({_first_line(error)})",
            "all ranks alive until it is over",
            "See which has died; the process group may be of no use any more",
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def named(ranks: Sequence[int]) -> str:
    """Their numbers, of very many the first."""
    shown = ", ".join(str(rank) for rank in ranks[:16])
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def as_bytes(text: str) -> NDArray[np.uint8]:
    """As what can be sent."""
    return np.frombuffer(text.encode(), np.uint8)
