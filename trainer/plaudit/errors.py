"""What can go wrong, and the exit code that a supervisor sees.

    PlauditError            1
    ├── ConfigError         2    a setting, a file or a model that cannot work: mend the command
    │   ├── ModelNotFound        (policy.model)
    │   ├── DataError            (data.tables)
    │   └── ChatTemplateError    (policy.chat) a chat template that is missing, or refuses a conversation
    ├── NotFinite           1    NaN or an infinity; nothing that holds one is saved
    ├── NonFiniteUpdate     1    (learner.minibatches) the same in a PPO update
    ├── NotAsSaved          1    what was written reads back as something else
    ├── AtChance           65    (stages.ranked_answers) a reward model orders held-out answers no better than guessing
    ├── ProcessLost         1    (parallel.launch)    another process of the run has ended
    ├── NotWritten         74    (run.storage) the disk is full or can't be written to: make room, then resume
    ├── StopRequested  128 + n   (run.runtime) SIGTERM or Ctrl-C: resume
    ├── RankingsRejected   65    (run.rankings) the ranking service refuses what it is sent: trying again won't help
    ├── RankingsUnavailable 75   (run.rankings) it can't be reached, or people have not finished: go on later
    └── RewardError              (rewards.errors)
        ├── RewardRejected 65    the reward service refuses what it is sent: trying again won't help
        │   └── NoScore          a judge answered and named no score
        └── RewardUnavailable 75 the reward service can't be reached: start it, then resume

How to add one: derive it from `PlauditError` in the package that raises it, set `exit_code` if a supervisor should do
something else about it, and word the message as one line that names the value and says what to do. The command line
prints the message alone. Any other exception is printed with its type, as an error of the program.
"""

from typing import ClassVar

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REJECTED = 65
"""EX_DATAERR of sysexits.h."""
EXIT_NOT_WRITTEN = 74
"""EX_IOERR."""
EXIT_UNAVAILABLE = 75
"""EX_TEMPFAIL."""
EXIT_INTERRUPTED = 130


class PlauditError(Exception):
    """The root of them all. The message is one line for a person."""

    exit_code: int = EXIT_FAILED
    """The process's exit code when this ends a stage."""
    can_be_resumed: ClassVar[bool] = False
    """Whether the same command, told to resume, goes on where this ended it."""


class ConfigError(PlauditError):
    """A setting that cannot work. The message names the field, the value and what to do."""

    exit_code = EXIT_USAGE


class NotFinite(PlauditError):
    """A loss, a figure or a weight is NaN or infinite. Nothing that holds one is saved."""


class NotAsSaved(PlauditError):
    """What was written, read again, is something else. It does not take the place of what was there."""
