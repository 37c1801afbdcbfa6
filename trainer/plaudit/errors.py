"""The exception hierarchy, and the exit code for each exception.

    PlauditError            1
    ├── ConfigError         2    an invalid setting, file or model: change the command
    │   ├── ModelNotFound        (policy.pretrained)
    │   ├── ChatTemplateError    (data.chat_templates)
    │   └── DataError            (data.tables)
    ├── NotFinite           1    a NaN or infinite number; nothing with one is saved
    ├── NonFiniteUpdate     1    (learner.minibatches) the same in a PPO update
    ├── ProblemsFound       1    (stages.doctor) `plaudit doctor` found something wrong
    ├── NotAsSaved          1    a file differs from what was written to it
    ├── AtChance           65    (stages.ranked_answers) a reward model's held-out accuracy is no better than guessing
    ├── ProcessLost         1    (parallel.launch)    another process of the run has died
    ├── NotWritten         74    (run.storage) the disk is full or not writable: free space, then resume
    ├── StopRequested  128 + n   (run.runtime) SIGTERM or Ctrl-C: resume
    ├── RankingsRejected   65    (run.rankings) the ranking service refused a request: a retry won't help
    ├── RankingsUnavailable 75   (run.rankings) it is unreachable, or people have not finished: continue later
    ├── HubRejected        65    (run.hub) the model hub refused an upload: a retry won't help
    ├── HubUnavailable     75    (run.hub) the model hub is unreachable: push again later
    └── RewardError              (rewards.errors)
        ├── RewardRejected 65    the reward service refused a request: a retry won't help
        │   └── NoScore    65    a generative judge's answer contains no score
        └── RewardUnavailable 75 the reward service is unreachable: start it, then resume

To add one, derive it from `PlauditError` in the package that raises it. Set `exit_code` if a supervisor should react
differently. The message is one line that names the value and says what to do. The command line prints only the message;
any other exception is printed with its type, as a bug.
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
    """The base class of Plaudit's exceptions. The message is one line for people."""

    exit_code: int = EXIT_FAILED
    """The process's exit code if this exception ends a stage."""
    can_be_resumed: ClassVar[bool] = False
    """Whether the same command can continue with --resume."""


class ConfigError(PlauditError):
    """An invalid setting. The message names the field, the value and what to do."""

    exit_code = EXIT_USAGE


class NotFinite(PlauditError):
    """A loss, a metric or a weight is NaN or infinite. Nothing that contains one is saved."""


class NotAsSaved(PlauditError):
    """A written file reads back differently. It does not replace the previous result."""
