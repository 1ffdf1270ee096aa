"""What a recorder tells of its run."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import WrongState
from ..internals import undisturbed, untraced
from ..kernels import layout
from ..kernels.layout import FORWARDS, OBSERVED
from ..kernels.stepping import Clock
from ..layers import Router
from ..results import Routes, Trace, from_known, from_rows, stats_of
from .bank import Bank
from .evidence import Evidence
from .reading import Reading, read_banks
from .route_bank import read_routes
from .sample_meta import sample_meta


class Answers:
    """The banks of a recorder and what else is known of its run, read on the host."""

    names: list[str]
    stats: tuple[str, ...]
    banks: list[Bank]
    clock: Clock
    forwards: int
    evidence: Evidence
    branches: list[str]
    unmeasured: dict[str, str]
    routers: list[Router]
    unrouted: dict[str, str]
    meta: dict[str, Any]
    call_metas: list[dict[str, Any]]
    per_sample: bool

    @untraced
    def forward_counts(self) -> tuple[int, int]:
        """Forwards that have begun in this run, and how many of them were observed; waits for the device."""
        with undisturbed():
            _, control = self.banks[0].state()
        return int(control[FORWARDS]), int(control[OBSERVED])

    def read(self, since: int | None = None) -> Reading:
        """Everything known, or of forward `since` and later ones; waits for the device."""
        return read_banks(self.banks, self.clock, since)

    @untraced
    def routes(self) -> Routes:
        """What the routers chose."""
        if not self.routers:
            raise WrongState(
                "No router is observed", "a model whose routers were selected", 'Pass wrap(..., layers="routers")'
            )
        steps, control = (tensor.cpu().numpy() for tensor in (self.banks[0].steps, self.banks[0].control))
        counted = [bank.routes for bank in self.banks if bank.routes is not None]
        return read_routes(self.routers, counted, steps, control, unmeasured=self.unrouted, meta=self.meta)

    @np.errstate(over="ignore", invalid="ignore")  # rows of float64 outputs may hold infinities
    @untraced
    def trace(self, since: int | None = None) -> Trace:
        """What is known, as a trace, or of forward `since` and later ones alone, which reads no more than these."""
        reading, stats = self.read(since), self.stats
        measured = since is not None or bool(reading.totals[..., layout.CALLS].any())
        lost = self.evidence.left_no_mark(reading.forwards, self.forwards, measured)
        if lost is not None:
            self.evidence.say(lost)
        elif not reading.forwards and len(reading.rows):
            calls = reading.rows[-1, 0, :, layout.CALLS]
            if since is not None or calls.max() > 1:  # whoever reads all sees the open step, and one call is one step
                self.evidence.say_open(self.names[int(calls.argmax())], int(calls.max()))

        def one(row: int) -> Trace:
            meta = dict(self.meta)
            fields, totals, known = reading.rows[:, row], reading.totals[row], from_known(reading.steps, self.branches)
            if row:
                meta |= sample_meta(row - 1, self.call_metas or [self.meta], known["branches"], known["batches"])
                own = reading.timesteps[:, row - 1]
                known["timesteps"] = np.where(np.isnan(own), known["timesteps"], own)
            return Trace(
                values=stats_of(fields, stats),
                layers=list(self.names),
                stats=stats,
                totals=stats_of(totals[:, : -layout.AVERAGES], stats),
                averages=totals[:, -layout.AVERAGES :],
                dropped_steps=reading.dropped,
                unmeasured=dict(self.unmeasured),
                meta=meta,
                **from_rows(fields),
                **known,
            )

        whole = one(0)
        if lost is not None:
            whole.unmeasured = {**dict.fromkeys(self.names, lost), **whole.unmeasured}
        if self.per_sample:
            used = (reading.totals[1:, :, layout.STEPS] > 0).any(1).sum()
            whole.samples = [one(1 + sample) for sample in range(int(used))]
            self.evidence.say_without_samples(reading.without_samples(self.names))
        return whole
