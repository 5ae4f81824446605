"""The findings on a run: what each means and what to change, in the words of terminal, files and report."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["alarm", "note"]


@dataclass(frozen=True)
class Words:
    """What a finding says. An alarm: continuing without a change wastes the run. A note: something to watch."""

    level: Level
    title: str
    means: str
    change: str


FINDINGS: dict[str, Words] = {
    "labels_oppose_scores": Words(
        "alarm",
        "the labels oppose the stored scores",
        "the labels prefer the image that the reward scored lower: the order is probably reversed, and training would "
        "make images worse by that reward",
        "check which image of a pair is the winner, and whether a higher score is better; rank the dataset again",
    ),
    "labels_ignore_scores": Words(
        "alarm",
        "the labels agree with no stored score",
        "pairs are ordered as by chance: labels may belong to other images (shuffled, or joined by the wrong key)",
        "look at a few groups with their labels; rank the dataset again; if the labels are people's and the score "
        "measures something else, this is expected",
    ),
    "labels_shuffled": Words(
        "note",
        "the labels were shuffled, as a control",
        "preferences were given to the images of a group at random: what this run learns is what chance teaches",
        "compare it with a run on the true labels; `diffalign rank DATASET` without shuffle=true makes them",
    ),
    "generators_explain_ranking": Words(
        "note",
        "the generator of an image explains its rank",
        "one generator wins nearly always, so the policy can learn that generator's look instead of what is preferred "
        "among its images",
        "compare with a control trained on images of one generator, or balance the winners over generators",
    ),
    "labels_without_spread": Words(
        "alarm",
        "most groups state no preference",
        "groups whose labels are all equal, or of which fewer than two images have one, get no weight, so most of every step "
        "is wasted",
        "use a finer score (labels.source=scores.NAME.COLUMN), more images per prompt, or harder prompts",
    ),
    "average_is_start": Words(
        "alarm",
        "the average is dominated by its start",
        "the weights that are validated and saved are an average over so many steps that much of it is the weights before the "
        "first: what was trained is mostly lost",
        "set train.ema_warmup=true, a smaller train.ema_decay, or more train.steps",
    ),
    "too_short": Words(
        "note",
        "too short to judge",
        "most checks look at the last 20 logged steps, and there are fewer: that nothing else was found says nothing",
        "log every step (train.log_every=1), or train for longer",
    ),
    "not_finished": Words(
        "note",
        "not finished",
        "the run stopped before its last step: by a signal, an error, an alarm, or for lack of a better validation",
        "run the same command again; it resumes",
    ),
    "accuracy_stuck": Words(
        "alarm",
        "the implicit accuracy stays at chance",
        "after enough groups to tell, the policy prefers the labelled winner hardly more often than by chance: the labels "
        "may be random, or too weak a signal for this amount of data",
        "check the labels (shuffled? joined by the wrong key?); try a higher optimizer.lr or more groups_per_step",
    ),
    "beta_too_small": Words(
        "alarm",
        "beta is too small: nothing ties the policy to the reference",
        "the errors move away from the reference's, but the gradient stays that of the first step, and would even if they "
        "doubled: the sigmoid never saturates, and the policy drifts without limit",
        "raise objective.beta (by 100, for example), or let train.auto_beta find it",
    ),
    "winner_rises": Words(
        "alarm",
        "the winner's error rises above the reference's",
        "the policy becomes worse on the images that it should prefer: the objective constrains only the difference to "
        "the loser, and both are being unlearnt",
        "lower optimizer.lr or train.steps, raise objective.beta, or set objective.anchor or objective.loser_weight "
        "below 1",
    ),
    "loser_dominates": Words(
        "alarm",
        "the margin comes from the loser alone",
        "the loser's error has doubled against the reference's while the winner's has not fallen: the policy only "
        "makes the loser worse",
        "set objective.loser_weight below 1 or objective.margin_clamp, lower optimizer.lr, or raise objective.beta",
    ),
    "margin_saturated": Words(
        "alarm",
        "the margin is saturated",
        "the gradient factor is near 0: nearly every group is ordered with certainty, and only noise and the few wrong "
        "labels still have a gradient",
        "lower objective.beta, use more data, or stop here and keep an earlier checkpoint",
    ),
    "reference_disagrees": Words(
        "note",
        "pairs whose loser the reference prefers are not learnt",
        "where the reference already fits the winner better the policy learns the labels, and where it fits the loser better "
        "the policy moves the wrong way: the labels may be wrong there, or the pull too weak",
        "look at such pairs; set objective.offset (dpo), or draw the images from the model itself",
    ),
    "gradient_jumps": Words(
        "alarm",
        "the gradient norm jumped",
        "several steps in a row have gradients many times larger than before: training has become unstable",
        "lower optimizer.lr, add optimizer.warmup_steps, or set train.skip_grad_norm",
    ),
    "gradient_vanished": Words(
        "alarm",
        "the gradient is 0",
        "nothing is learnt any more: every image has reached the reward's threshold, or the reward's gradient does not "
        "reach the weights",
        "stop here, or raise the rewards' threshold; images that are clipped to black and white have no gradient either",
    ),
    "loss_diverges": Words(
        "alarm",
        "the loss rises instead of falling",
        "the loss is well above where it started: steps are too large for this model",
        "lower optimizer.lr (by a factor of 10, for example) or add optimizer.warmup_steps",
    ),
    "drift_explodes": Words(
        "alarm",
        "the policy has left the reference",
        "its predictions differ from the reference's by as much as those differ from the truth, and are worse: images are "
        "likely broken",
        "lower optimizer.lr, raise objective.beta, or go back to an earlier checkpoint",
    ),
    "diversity_falls": Words(
        "alarm",
        "the images of a prompt become alike",
        "the student's images of one prompt differ by less than half of what they did: it collapses to a few images, which "
        "rewards and guidance can both cause and which a reward does not show",
        "raise fake.updates or fake.optimizer.lr (the fake network lags behind), lower optimizer.lr, reward.strength or "
        "match.guidance, and take an earlier checkpoint",
    ),
    "reward_below_base": Words(
        "alarm",
        "the validation reward is below the untrained model's",
        "images got worse on prompts that are not trained on, by more than chance: the labels may be reversed or meant for "
        "another taste, or training went on for too long",
        "check the labels' direction; else take best/, lower optimizer.lr or raise objective.beta (drift.weight where a "
        "reward's gradient is followed)",
    ),
    "drift_without_reward": Words(
        "note",
        "drift grows, the validation reward does not",
        "the policy still moves away from the reference, but the reward does not rise: over-optimisation begins here",
        "take best/ and stop here (validation.patience does so automatically), or raise objective.beta (drift.weight where a "
        "reward's gradient is followed)",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A finding on a run.

    name: a key of FINDINGS. step: the first step at which it held (0: before training). measured: the evidence.
    """

    name: str
    step: int
    measured: str

    @property
    def words(self) -> Words:
        """The finding's level, title, meaning and remedy."""
        return FINDINGS[self.name]

    def as_dict(self) -> dict[str, Any]:
        """Return what `health.json` holds."""
        return {"name": self.name, "step": self.step, "measured": self.measured, **asdict(self.words)}


def describe(finding: Finding) -> str:
    """Return the finding as one line for a terminal."""
    words = finding.words
    when = f"step {finding.step}" if finding.step else "before training"
    return (
        f"{words.level}, {when}: {words.title} ({finding.measured}). It means: {words.means}. Change: {words.change}."
    )
