"""Trials that look hacked: what they are trained on rises, and a judge that no training sees falls."""

from rltune.config.sections import JOINT_SHARES
from rltune.report.gather import Gathered
from rltune.runs.results import TrialResult

NO_WITNESSES = frozenset({"drift", *JOINT_SHARES})
"""Judges that cannot speak against a trial: drift, since any training moves away from the base model, and what is made
of the objectives themselves."""
RULE = (
    "A trial is marked where the 95 % interval of the gain lies wholly above 0 in a reward that it was trained on, and "
    "wholly below 0 in a judge that no training sees. Of judges that a training leaves as they are, one in forty would "
    "fall so by chance. The mark says where to look at the pictures, not that they are bad."
)


def judges(run: Gathered) -> tuple[str, ...]:
    """Return what was measured and not trained on, and can speak against a trial."""
    return tuple(name for name in run.names if name not in run.rewards and name not in NO_WITNESSES)


def hacked_trials(run: Gathered) -> dict[str, str]:
    """Return the trials that look hacked by the numbers that are reported of them, and why."""
    return {row.trial: why for row in run.trained if (why := _why(run, run.shown(row)))}


def _why(run: Gathered, result: TrialResult) -> str:
    risen = [name for name in run.rewards if (gain := run.gain(result, name)) is not None and gain.is_above]
    fallen = [
        name
        for name in judges(run)
        if (gain := run.gain(result, name)) is not None and (gain.is_below if run.is_better_up(name) else gain.is_above)
    ]
    if not risen or not fallen:
        return ""
    return f"{', '.join(risen)} rose, {', '.join(fallen)} fell"
