"""Drift: whether the inputs of a served model are still like its calibration samples, watched without end.

The p-values of a stream are no independent uniform numbers: all of them lean on the same n calibration scores, so a
test that takes them for such is sure to give a false alarm one day. What is independent and uniform is the rank of each
new score among the calibration scores *and* all scores of the stream so far, ties broken at random, if all of these
are exchangeable (Vovk, Nouretdinov, Gammerman 2003, "Testing exchangeability on-line"; with a fixed part to
begin with: Volkhonskiy et al. 2017, "Inductive conformal martingales for change-point detection", 1706.03415).

That rank needs no more than the p-values. p = k / (n + 1) says between which two calibration scores a score lies. Two
scores of the stream between the same two are as likely to stand in either order, whatever came before, so drawing their
order at random gives ranks of the same distribution as the true ones. A count for each of the n + 1 places is all that
is kept. Where a score equals calibration scores, its p-value counts it as less strange than they are. Its rank then is
never stranger than with ties broken at random, and as every bet below pays more the stranger a rank is, the capital
never grows faster either.

On each rank p a gambler bets: starting with 1, the capital is multiplied by e p^(e - 1), whose mean over uniform p is
1, for several e between 0 and 1 (power martingales, same source). He does not know when drift begins, so he keeps most
of the capital in cash and moves a little into fresh bets before each observation; moving money changes no sum. The
whole is a martingale that starts at 1 and is never negative: the chance that it ever reaches 1 / alpha is at most
alpha (Ville 1939).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import files
from ..errors import BadType, BadValue, WrongState
from ..numerics import Floats, Ints
from ..results import Saved, Surprise
from .calibration import Calibration, p_values

#: Exponents of the bets: 0.05 wins most by few very strange inputs, 0.95 by many that are a little strange.
EXPONENTS = np.linspace(0.05, 0.95, 10)
#: A bet that has won so much wins no more, and stays a number.
MOST = 1e250
#: p-values may have been rounded to single precision on their way, no further.
ROUNDING = 0.01


class DriftMonitor(Saved):
    """Watches the p-values of a stream of inputs, and raises an alarm when they drift towards strange ones.

    If the stream is exchangeable with the calibration samples (independent draws from the same source are), the
    chance of ever raising an alarm, however long the stream, is at most `alpha`. It is a chance over calibration sets
    as well: with the unluckiest of 20 sets of 100 to 200 scores, at alpha 0.05, alarms were false in 3 to 52 % of
    streams of 2,000 to 10,000 (nearly all, if p-values are taken for independent). Inputs that depend on each other,
    such as the frames of a video, are not exchangeable; pass every n-th. Drift towards inputs that are less strange
    is not looked for.

    `save` and `DriftMonitor.load` keep a monitor between processes, calibration scores and draws included: a stream
    that is cut in two is judged as if it had not been.

    After drift the stream becomes its own reference little by little, so drift that is weak against the number of
    normal scores before it (calibration samples included) may never be found. With 500 calibration scores, inputs
    that all lie beyond the usual 95th percentile are found after 4 to 7; where the share of p <= 0.05 has risen to
    0.2, after 85 in the median, to 0.15 after 260, to 0.1 mostly never.

    Attributes:
        alpha: the most that the chance of a false alarm may be.
        seen: observations since the start, or since `reset`.
        capital: what 1 has become; evidence of drift, an alarm at 1 / alpha. May be reported at any time.
        alarm: whether the capital has ever reached 1 / alpha; stays true until `reset`.
        alarm_at: position of the observation at which it did, from 0, or None.

    Examples:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook())
        >>> monitor = noesis.DriftMonitor(wrapped.calibrate([torch.randn(600, 4)]))
        >>> _ = wrapped(torch.randn(50, 4))
        >>> monitor.update(wrapped.surprise())
        False
        >>> _ = wrapped(3 * torch.randn(50, 4))
        >>> monitor.update(wrapped.surprise())
        True
    """

    kind: ClassVar[str] = "drift_monitor"

    def __init__(self, calibration: Calibration, *, alpha: float = 0.01, seed: int = 0) -> None:
        """A monitor that has seen nothing.

        Args:
            calibration: what gives the p-values: `wrapped.calibration`.
            alpha: the most that the chance of a false alarm may be, between 0 and 1.
            seed: of the generator that breaks ties; no other random numbers are consumed.

        Raises:
            NoesisError: for anything else than a calibration, an alpha that is no chance, or a seed that is no number.
        """
        if not isinstance(calibration, Calibration):
            given = "None" if calibration is None else f"a {type(calibration).__name__}"
            raise BadType(f"DriftMonitor({given})", "a calibration", "Pass wrapped.calibrate(loader)'s result")
        if not 0 < alpha < 1:
            raise BadValue(f"DriftMonitor(alpha={alpha})", "a chance between 0 and 1", "Pass alpha=0.01")
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise BadType(f"DriftMonitor(seed={seed!r})", "a whole number from 0", "Leave it out for 0")
        self.alpha = float(alpha)
        self._scores: Floats = calibration.scores
        self._by_class = calibration.classes is not None
        self._calibrated = repr(calibration)
        self._seed = int(seed)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: no observation, no alarm. The bound then holds for what follows."""
        self._generator = np.random.default_rng(self._seed)
        self._counts: Ints = np.zeros(len(self._scores) + 1, np.int64)  # of the stream, at each place
        self._bets: Floats = np.zeros(len(EXPONENTS))
        self.seen = 0
        self.alarm_at: int | None = None

    @property
    def capital(self) -> float:
        """What 1 has become."""
        return _cash(self.seen) + float(self._bets.sum())

    @property
    def alarm(self) -> bool:
        """Whether the capital has ever reached 1 / alpha."""
        return self.alarm_at is not None

    def update(self, p_values: ArrayLike | Surprise) -> bool:
        """Take the next observations of the stream, in their order; returns whether the alarm is raised.

        How a stream is cut into calls makes no difference.

        Args:
            p_values: float [N], or one, as `surprise().p_value` gives them; or a `Surprise` itself, which is needed
                with `calibrate(..., by_class=True)`, since p-values of different classes cannot be ranked together.

        Raises:
            NoesisError: for NaN, or p-values that cannot be of the calibration; nothing is taken then.
        """
        places = self._places(p_values)
        draws = 1 - self._generator.random(len(places))  # in (0, 1]
        for place, draw in zip(places.tolist(), draws.tolist(), strict=True):
            self._bet(self._rank(place, draw))
            self._counts[place] += 1
            self.seen += 1
            if self.alarm_at is None and self.capital >= 1 / self.alpha:
                self.alarm_at = self.seen - 1
        return self.alarm

    def _rank(self, place: int, draw: float) -> float:
        """The new score's place among all others, in (0, 1], the strangest first (smoothed conformal p-value)."""
        stranger = place + int(self._counts[:place].sum())  # calibration scores, and the stream's
        alike = int(self._counts[place]) + 1
        return (stranger + draw * alike) / (len(self._counts) + self.seen)

    def _bet(self, rank: float) -> None:
        moved = _cash(self.seen) - _cash(self.seen + 1)
        bets = self._bets + moved / len(EXPONENTS)
        self._bets = np.minimum(bets * EXPONENTS * rank ** (EXPONENTS - 1), MOST)

    def _places(self, given: ArrayLike | Surprise) -> NDArray[np.int64]:
        """How many calibration scores are at least as strange as each observation."""
        grid = len(self._counts)
        if isinstance(given, Surprise):
            p = p_values(self._scores, given.score)  # without classes, also where there are some
            if not self._by_class and not np.array_equal(p, given.p_value):
                raise _other(f"A surprise with p-values of another calibration than {self._calibrated}", grid)
        elif self._by_class:
            raise WrongState(
                "p-values of a calibration by class",
                "what ranks inputs of all classes together",
                "Pass the surprise itself: monitor.update(wrapped.surprise())",
            )
        else:
            p = np.atleast_1d(np.asarray(given, np.float64))
        if p.ndim != 1:
            raise BadValue(f"p-values of shape {p.shape}", "[N]", "Pass surprise().p_value")
        wrong = np.flatnonzero(~((p > 0) & (p <= 1)))
        if len(wrong):
            raise BadValue(f"p-value {p[wrong[0]]} at {wrong[0]}", "numbers in (0, 1]", "Pass surprise().p_value")
        places = np.rint(p * grid)
        wrong = np.flatnonzero((np.abs(p * grid - places) > ROUNDING) | (places < 1))
        if len(wrong):
            raise _other(f"p-value {p[wrong[0]]} at {wrong[0]}", grid)
        return places.astype(np.int64) - 1

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        generator = self._generator.bit_generator.state
        return {
            "alpha": self.alpha,
            "seed": self._seed,
            "seen": self.seen,
            "alarm_at": self.alarm_at,
            "by_class": self._by_class,
            "calibration": self._calibrated,
            # As text: numbers of 128 bits are beyond what most readers of JSON can hold.
            "generator": {name: str(value) for name, value in generator["state"].items()},
        }

    def _arrays(self) -> files.Arrays:
        return {"scores": self._scores, "counts": self._counts, "bets": self._bets}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(array) for name, array in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> DriftMonitor:
        arrays = {name: np.asarray(payload[name], dtype=np.float64) for name in ("scores", "counts", "bets")}
        return cls._from_arrays(arrays, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> DriftMonitor:
        scores, counts, bets = arrays["scores"], arrays["counts"], arrays["bets"]
        if scores.ndim != 1 or not len(scores) or not (scores[1:] >= scores[:-1]).all() or np.isnan(scores[0]):
            raise ValueError("scores that are not in order")
        if counts.shape != (len(scores) + 1,) or not ((counts >= 0) & (counts == np.floor(counts))).all():
            raise ValueError(f"counts of shape {counts.shape}, or that are no whole numbers from 0")
        if bets.shape != EXPONENTS.shape or not ((bets >= 0) & (bets <= MOST)).all():
            raise ValueError(f"bets of shape {bets.shape}, or that are no capital")
        alpha, seed, seen, alarm_at = (header[name] for name in ("alpha", "seed", "seen", "alarm_at"))
        if type(alpha) is not float or not 0 < alpha < 1 or type(seed) is not int or type(seen) is not int:
            raise TypeError(f"alpha={alpha!r}, seed={seed!r}, seen={seen!r}")
        if counts.sum() != seen or not (alarm_at is None or (type(alarm_at) is int and 0 <= alarm_at < seen)):
            raise ValueError(f"{seen} seen, counts of {counts.sum():.0f}, alarm_at={alarm_at!r}")
        monitor = cls.__new__(cls)
        monitor.alpha, monitor._seed = alpha, seed
        monitor._scores, monitor._by_class = scores.astype(np.float64), bool(header["by_class"])
        monitor._calibrated = str(header["calibration"])
        monitor.reset()
        monitor._counts, monitor._bets = counts.astype(np.int64), bets.astype(np.float64)
        monitor.seen, monitor.alarm_at = seen, alarm_at
        state = {name: int(text) for name, text in header["generator"].items()}
        monitor._generator.bit_generator.state = {**monitor._generator.bit_generator.state, "state": state}
        return monitor

    # ------------------------------------------------------------ showing

    def __repr__(self) -> str:
        alarm = f"alarm at observation {self.alarm_at}" if self.alarm else "no alarm"
        return (
            f"DriftMonitor({alarm}, {self.seen} seen, capital {self.capital:.3g}, alarm at {1 / self.alpha:.4g}: "
            f"false in at most {100 * self.alpha:.3g} % of streams)"
        )


def _cash(seen: int) -> float:
    """What is not yet bet: it falls so slowly that late drift is still found, which costs about log(seen) nats."""
    return 1 / (1 + math.log1p(seen))


def _other(given: str, grid: int) -> BadValue:
    return BadValue(
        given,
        f"multiples of 1/{grid}, which the p-values of this calibration are",
        "Pass surprise().p_value as it is, of the model that was calibrated, to a monitor of that calibration",
    )
