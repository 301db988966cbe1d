"""Which settings make a run depart, found by running mixtures of two configurations.

The order of the trials is ddmin's, and how they are run is the trials' affair; here is what they are asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xtrain.align.alignment import Alignment, align_records
from xtrain.align.changes import Setting, group, mix
from xtrain.align.compare import Policy
from xtrain.align.ddmin import minimal_in_groups
from xtrain.align.differences import header_differences
from xtrain.align.envelope import Envelope
from xtrain.align.record import Record
from xtrain.align.trials import Configuration, Trial, Trials
from xtrain.base.errors import RecordError

_MOST_NAMES = 4


@dataclass(frozen=True)
class Verdict:
    """What a trial says: the comparison, or else why it says nothing (a run that failed, say)."""

    number: int
    label: str
    trial: Trial
    alignment: Alignment | None
    unresolved: str = ""

    @property
    def departs(self) -> bool:
        """Whether it was compared, and is outside of the policy."""
        return self.alignment is not None and not self.alignment.aligned

    def words(self) -> str:
        """The outcome in a few words."""
        if self.alignment is None:
            return f"not known: {self.unresolved}"
        return f"departs at step {self.alignment.began}" if self.departs else "agrees"

    def time(self) -> str:
        """How long it took."""
        return "from an earlier search" if self.trial.kept else f"{self.trial.seconds:.0f} s"


@dataclass(frozen=True)
class Cause:
    """Settings that together, and with none of them left out, make a run depart.

    Attributes:
        verdict: of the run with them.
        unresolved: of the runs with one of them left out, those that could not be judged.
    """

    settings: tuple[Setting, ...]
    verdict: Verdict
    unresolved: list[Verdict]


@dataclass
class Bisection:
    """A search with its trials; `search()` is the whole of it.

    Attributes:
        rest: the last trial, BAD without the causes; None where nothing else differs.
    """

    good: Configuration
    bad: Configuration
    settings: list[Setting]
    trials: Trials
    policy: Policy
    envelope: Envelope | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    rest: Verdict | None = None
    _reference: Record | None = None
    _known: dict[frozenset[Setting], Verdict] = field(default_factory=dict)

    def _judge(self, label: str, trial: Trial) -> Verdict:
        record, found, unresolved = trial.record, None, trial.failure
        if record is not None and len(record.step) and self._reference is not None:
            try:
                found = align_records(self._reference, record, self.policy, self.envelope)
            except RecordError as error:
                unresolved = unresolved or str(error)
        elif not unresolved:
            unresolved = "its record has no step with a loss"
        if found is not None and found.aligned and trial.failure:
            found = None  # what it did agrees, and it did not do everything
        verdict = Verdict(len(self.verdicts) + 1, label, trial, found, unresolved)
        self.verdicts.append(verdict)
        print(f"{verdict.number:>3}  {verdict.words()} ({verdict.time()}): {label}", flush=True)
        return verdict

    def _label(self, chosen: tuple[Setting, ...]) -> str:
        most = len(chosen) > len(self.settings) / 2
        named = [setting for setting in self.settings if setting not in chosen] if most else chosen
        more = f" and {len(named) - _MOST_NAMES} more" if len(named) > _MOST_NAMES else ""
        names = ", ".join(setting.name for setting in named[:_MOST_NAMES])
        return f"{'BAD without' if most else 'GOOD with'} {names}{more}"

    def _try(self, chosen: tuple[Setting, ...], label: str | None = None) -> Verdict:
        key = frozenset(chosen)
        if key not in self._known:
            about = [setting.sentence() for setting in chosen]
            trial = self.trials.run(mix(self.good.tree, self.bad.tree, chosen), about)
            self._known[key] = self._judge(label or self._label(chosen), trial)
        return self._known[key]

    def _reproduce(self) -> None:
        """Settle the reference, and see that GOOD agrees with itself: else nothing can be blamed."""
        recorded, first = self.good.record, None
        if recorded is None:
            first = self.trials.run(self.good.tree, ["GOOD"])
            if first.failure:
                raise RecordError(f"GOOD ({self.good.path}) cannot be run: {first.failure}")
        self._reference = recorded if first is None else first.record
        if first is not None and self.policy.kind == "envelope":
            verdict = self._judge("GOOD", first)  # the envelope is the judge, and not another run
        else:
            source = recorded.path if recorded is not None else self.trials.folder
            print(f"  0  the reference is GOOD: {source if first is None else first.folder}", flush=True)
            again = self.trials.run(self.good.tree, ["GOOD"], again=recorded is None)
            verdict = self._judge("GOOD, run again", again)
        if verdict.alignment is None:
            raise RecordError(f"GOOD ({self.good.path}) cannot be run again: {verdict.unresolved}")
        if not verdict.departs:
            return
        if self.policy.kind == "envelope":
            what, hint = "GOOD is outside the envelope", "was it measured here, and from these settings?"
        elif recorded is not None:
            what = "GOOD, run again, does not agree with its own record"
            hint = f"pass {self.good.path / 'config.yaml'} to start from what it does here and now"
        else:
            what = "GOOD does not agree with itself when it is run again"
            hint = "use a wider policy or an envelope, or make the run repeatable"
        raise RecordError(
            f"{what} ({self.policy}, step {verdict.alignment.began}), so no setting can be blamed: {hint}"
        )

    def _bad_departs(self) -> bool:
        verdict = self._try(tuple(self.settings), "BAD")
        if verdict.alignment is None:
            raise RecordError(f"BAD ({self.bad.path}) cannot be run: {verdict.unresolved}")
        if not verdict.departs and self.bad.record is not None:
            self._check_record_of_bad(self.bad.record, verdict.trial.record)
        return verdict.departs

    def _check_record_of_bad(self, recorded: Record, rerun: Record | None) -> None:
        """It agrees when it is run again: it must not be said that there is nothing to explain if it did depart."""
        assert self._reference is not None
        assert rerun is not None
        then = align_records(self._reference, recorded, self.policy, self.envelope)
        if then.aligned:
            return
        apart = header_differences(recorded.header, rerun.header)[:_MOST_NAMES]
        where = "; ".join(f"{d.key}: {d.reference} then, {d.candidate} now" for d in apart)
        raise RecordError(
            f"BAD agrees with GOOD when it is run again, and its own record departs at step {then.began}: "
            f"that does not come from its settings ({where or 'and its record shows no other difference'})"
        )

    def search(self) -> bool:
        """Find all causes; returns False where BAD agrees with GOOD.

        Raises:
            RecordError: GOOD or BAD cannot be run, or GOOD does not agree with itself.
        """
        self._reproduce()
        departs, left = self._bad_departs(), tuple(self.settings)
        while departs:
            found = minimal_in_groups(group(list(left)), lambda chosen: self._try(chosen).departs)
            one_less = (frozenset(found) - {setting} for setting in found)
            smaller = [self._known[fewer] for fewer in one_less if fewer in self._known]
            self.causes.append(
                Cause(found, self._try(found), [one for one in smaller if one.alignment is None])
            )
            left = tuple(setting for setting in left if setting not in found)
            self.rest = self._try(left) if left else None
            departs = self.rest is not None and self.rest.departs
        return bool(self.causes)
