"""What attribution patching estimates, and what exact patching says of some of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .. import files
from ..errors import BadValue
from ..numerics import Floats, benjamini_hochberg, sign_flip_test
from ..results import Cells
from ..text import counted, table
from .effects import LEVEL, Effects
from .sites import Site, site_of

#: Of the largest exact effect among cells that were checked: an estimate that is further off is a wrong one; and of the
#: largest estimate, what twice the steps may change.
TOLERANCE = 0.1
_SHOWN = 8


class Disagreement(NamedTuple):
    """A cell of which the estimate is wrong."""

    site: Site
    estimated: float  # the mean effect over pairs
    exact: float  # likewise, by exact patching
    apart: float  # the mean over pairs of how far the two are apart
    p_value: float  # of their mean difference, by a sign-flip test over pairs
    q_value: float  # adjusted for all cells that were checked


@dataclass(eq=False, repr=False)
class Attribution(Effects):
    """Effects that were estimated to first order, and the exact effects of some of the cells.

    An estimate is `difference of the two runs . gradient of the metric`, which is right for what the metric depends on
    linearly, and may be nought where something is saturated, such as sharp attention: so the cells of the largest
    estimates, and some at random of those near zero, are patched exactly. The estimate of a cell is wrong where, in the
    mean over pairs, it is further from the exact effect than `TOLERANCE` (0.1) times the largest exact effect that was
    seen. (Nanda 2023, "Attribution patching: activation patching at industrial scale"; Kramár et al. 2024, "AtP*".)

    Attributes:
        patched: the metric after each change, as estimated, float64 [cells, pairs].
        steps: along the path of the embeddings at which gradients were taken; 0 for the run that is changed alone.
        checked: the cells that were patched exactly.
        tops: how many of them, the first, are those of the largest estimates; the others were drawn.
        exact: the metric after these exact changes, float64 [checked, pairs].
        convergence: the most that twice the steps change an estimate, of the largest estimate; NaN where not tried.
        meta: of the runs.

    As a table it has a row per cell. For all else see `Effects`.

    Examples:
        >>> import numpy as np
        >>> from noesis.interp import Attribution, Site
        >>> sites = [Site("z", 0, 0), Site("z", 0, 1)]
        >>> one, zero = np.ones(3), np.zeros(3)
        >>> found = Attribution(
        ...     sites,
        ...     one,
        ...     zero,
        ...     np.stack([one, zero]),
        ...     "denoise",
        ...     "logit difference",
        ...     "gradients",
        ...     checked=sites,
        ...     tops=1,
        ...     exact=np.stack([one, one]),
        ... )
        >>> [str(each.site) for each in found.disagreements], found.trusted
        (['z.0.1'], False)
    """

    kind: ClassVar[str] = "attribution"
    ARRAYS: ClassVar[tuple[str, ...]] = ("clean", "corrupted", "patched", "exact")

    steps: int = 0
    checked: list[Site] = field(default_factory=list)
    tops: int = 0
    exact: Floats = field(default_factory=lambda: np.zeros(0))
    convergence: float = np.nan

    def __post_init__(self) -> None:
        self.exact = np.asarray(self.exact, np.float64).reshape(len(self.checked), -1 if len(self.checked) else 0)
        super().__post_init__()
        if len(self.checked) and self.exact.shape[1] != len(self.clean):
            raise BadValue(
                f"exact {self.exact.shape} of {counted(len(self.checked), 'checked cell')}",
                f"[checked, pairs] with {counted(len(self.clean), 'pair')}",
                "Pass the metric of each pair",
            )

    # ------------------------------------------------------------ the check

    @functools.cached_property
    def _compared(self) -> tuple[Floats, Floats]:
        """Estimated and exact effects of the cells that were checked, `[checked, pairs that count]`."""
        sites, values = self.candidates()
        rows = {str(site): row for row, site in enumerate(sites)}
        estimated = values[[rows[str(site)] for site in self.checked]]
        return estimated[:, self.kept], self.effects_of(self.exact)[:, self.kept]

    def candidates(self) -> tuple[list[Site], Floats]:
        """What can be patched exactly, and the estimated effects of it, `[candidates, pairs]`."""
        return self.sites, self.values

    @functools.cached_property
    def tolerance(self) -> float:
        """How far an estimate may be from the exact effect; NaN where nothing was checked."""
        if not self.checked:
            return np.nan
        means = mean_of_pairs(np.abs(self._compared[1]))
        return float(TOLERANCE * np.nanmax(means)) if np.isfinite(means).any() else np.nan

    @functools.cached_property
    def disagreements(self) -> list[Disagreement]:
        """The cells that were checked, and whose estimate is wrong, the most wrong first."""
        if not self.checked:
            return []
        estimated, exact = self._compared
        difference = estimated - exact
        apart = mean_of_pairs(np.abs(difference))
        p_value = sign_flip_test(np.nan_to_num(difference).T)
        q_value = benjamini_hochberg(p_value)
        # A hair more than nothing, where all exact effects are 0: estimates are rounded.
        wrong = np.flatnonzero(apart > max(self.tolerance, 1e-6))
        rows = wrong[np.argsort(-apart[wrong], kind="stable")].tolist()
        numbers = (mean_of_pairs(estimated), mean_of_pairs(exact), apart, p_value, q_value)
        return [Disagreement(self.checked[row], *(float(each[row]) for each in numbers)) for row in rows]

    @property
    def doubts(self) -> list[str]:
        """Why the estimate is not to be trusted; empty where nothing speaks against it."""
        found = []
        if wrong := self.disagreements:
            real = sum(each.q_value <= LEVEL for each in wrong)
            zeros = sum(each.site in self.checked[self.tops :] for each in wrong)
            found.append(
                f"{len(wrong)} of {counted(len(self.checked), 'cell')} that were patched exactly differ by more than "
                f"{self.tolerance:.2g} ({zeros} of them drawn near zero, {real} significantly)"
            )
        if self.convergence > TOLERANCE:
            found.append(
                f"{2 * self.steps} steps instead of {self.steps} change it by {self.convergence:.0%} of its largest "
                "effect"
            )
        return found

    @property
    def trusted(self) -> bool:
        """Whether some of it was checked, and nothing speaks against it."""
        return bool(self.checked) and not self.doubts

    # ------------------------------------------------------------ shown

    def _verdict(self) -> str:
        if doubts := self.doubts:
            return f"NOT TO BE TRUSTED: {'; '.join(doubts)}"
        if not self.checked:
            return "an estimate, not checked against exact patching"
        others = len(self.checked) - self.tops
        return (
            f"an estimate: the {self.tops} largest and {others} drawn near zero agree with exact patching "
            f"within {self.tolerance:.2g}"
        )

    def __repr__(self) -> str:
        first, *lines = super().__repr__().split("\n")
        lines = [first, self._verdict(), *lines]
        if np.isfinite(self.convergence):
            lines.append(f"twice the {self.steps} steps change it by {self.convergence:.1%} of its largest effect")
        if wrong := self.disagreements:
            rows = [[str(each.site), *(f"{number:.3g}" for number in each[1:])] for each in wrong[:_SHOWN]]
            lines.append(table(["wrong", "estimated", "exact", "apart", "p", "q"], rows))
            if len(wrong) > _SHOWN:
                lines.append(f"and {len(wrong) - _SHOWN} that are less so")
        return "\n".join(lines)

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        checked = [list(site) for site in self.checked]
        convergence = None if np.isnan(self.convergence) else self.convergence
        return {
            **super()._header(),
            "steps": self.steps,
            "checked": checked,
            "tops": self.tops,
            "convergence": convergence,
        }

    @classmethod
    def _fields(cls, arrays: files.Arrays, header: dict[str, Any]) -> dict[str, Any]:
        convergence = header["convergence"]
        return {
            **super()._fields(arrays, header),
            "steps": int(header["steps"]),
            "checked": [site_of(given) for given in list(header["checked"])],
            "tops": int(header["tops"]),
            "convergence": np.nan if convergence is None else float(convergence),
        }

    def _columns(self) -> dict[str, Cells]:
        exact = dict(
            zip(map(str, self.checked), mean_of_pairs(self.effects_of(self.exact)) if self.checked else [], strict=True)
        )
        return {
            **super()._columns(),
            "magnitude": self.magnitude,
            "exact": np.array([exact.get(str(site), np.nan) for site in self.sites]),
        }


def mean_of_pairs(values: Floats) -> Floats:
    """The mean over pairs, of those that are finite; NaN without one."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        found: Floats = np.where(finite, values, 0.0).sum(1) / finite.sum(1)
    return found
