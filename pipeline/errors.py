"""Every error that Bitmill raises on purpose.

The tree, with the exit status of ``bitmill`` in brackets::

    PipelineError [1]
    ├── SpecError [2]                     a variant name, spec key, value or flag that cannot be meant
    ├── SourceError [3]                   the model that should be converted
    │   ├── SourceNotFoundError           no such folder, repository, revision or file; or no access to it
    │   ├── UnsafeWeightsError            weights that are only there as pickles
    │   ├── CorruptWeightsError           header, index, digest or values that cannot be right
    │   └── UnsupportedArchitectureError  a model whose decoder blocks could not be found or run
    ├── CalibrationError [4]              the calibration or held-out text
    ├── PlanError [4]                     a plan that cannot be carried out (group size, memory, devices)
    ├── QuantizationError [1]             a solver that could not give a usable result
    ├── FormatError [1]                   codes that a checkpoint format cannot hold, or a checkpoint that lies
    ├── GateFailed [5]                    raised by the command only: a Verdict did not pass
    ├── StorageError [6]                  the target or the work directory
    │   ├── TargetUnavailableError        missing bucket, no permission, endpoint unreachable
    │   ├── ConditionalWriteError         a store that ignores If-None-Match / If-Match
    │   ├── ConflictError                 somebody else wrote first (retryable)
    │   ├── DiskFullError                 no space left
    │   └── CorruptReleaseError           a published release whose files do not match its manifest
    ├── GraphError [7]                    a task, worker or cluster that failed
    └── EngineError [8]                   an inference engine's environment or run

Errors cross process boundaries inside Ray, so each one must survive pickling: subclasses add no constructor
arguments.
"""

from __future__ import annotations

from typing import Any, ClassVar


class PipelineError(Exception):
    """A failure that names the thing, the reason and what to do next.

    Attributes:
        message: What is wrong, naming the file, repository, module or flag.
        code: Stable machine-readable reason, for example ``"source.pickle_only"``.
        hint: What to do next, ideally a command to type. Empty when there is nothing to advise.
        context: Further facts for logs; values must be JSON-serializable.
        retryable: Whether the same call may succeed later without a change.
    """

    exit_status: ClassVar[int] = 1
    default_code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str = "", hint: str = "", context: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.context = context or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.code, self.hint, self.context)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def _rebuild(cls: type[PipelineError], message: str, code: str, hint: str, context: dict[str, Any]) -> PipelineError:
    return cls(message, code=code, hint=hint, context=context)


class SpecError(PipelineError):
    """A variant name, spec key, value or flag that cannot be meant."""

    exit_status = 2
    default_code = "spec.invalid"


class SourceError(PipelineError):
    """Something is wrong with the model that should be converted."""

    exit_status = 3
    default_code = "source.invalid"


class SourceNotFoundError(SourceError):
    """No such folder, repository, revision or file, or no access to it."""

    default_code = "source.not_found"


class UnsafeWeightsError(SourceError):
    """The weights are only there as pickles."""

    default_code = "source.pickle_only"


class CorruptWeightsError(SourceError):
    """A header, index, digest or value that cannot be right."""

    default_code = "source.corrupt"


class UnsupportedArchitectureError(SourceError):
    """The decoder blocks of the model could not be found or run."""

    default_code = "source.unsupported_architecture"


class CalibrationError(PipelineError):
    """The calibration or held-out text cannot be used."""

    exit_status = 4
    default_code = "calibration.invalid"


class PlanError(PipelineError):
    """The plan cannot be carried out."""

    exit_status = 4
    default_code = "plan.infeasible"


class QuantizationError(PipelineError):
    """A solver could not give a usable result."""

    default_code = "quantize.failed"


class FormatError(PipelineError):
    """A checkpoint format cannot hold these codes, or a checkpoint contradicts itself."""

    default_code = "format.invalid"


class GateFailed(PipelineError):
    """A Verdict did not pass. Raised by the command line only; inside, a Verdict is a value."""

    exit_status = 5
    default_code = "gate.failed"


class StorageError(PipelineError):
    """The target or the work directory failed."""

    exit_status = 6
    default_code = "storage.failed"


class TargetUnavailableError(StorageError):
    """The target is missing, refuses us, or cannot be reached."""

    default_code = "storage.unavailable"


class ConditionalWriteError(StorageError):
    """The store ignores conditional writes, so releases on it could overwrite each other."""

    default_code = "storage.no_conditional_writes"


class ConflictError(StorageError):
    """Somebody else wrote first."""

    default_code = "storage.conflict"
    retryable = True


class DiskFullError(StorageError):
    """No space is left where we have to write."""

    default_code = "storage.full"


class CorruptReleaseError(StorageError):
    """A published release does not match its manifest."""

    default_code = "storage.corrupt_release"


class GraphError(PipelineError):
    """A task, a worker or the cluster failed."""

    exit_status = 7
    default_code = "graph.failed"


class EngineError(PipelineError):
    """An inference engine's environment or run failed."""

    exit_status = 8
    default_code = "engine.failed"
