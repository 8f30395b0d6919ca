"""What is known of a release, as values: written beside it as ``bitmill.json``, shown on its card, read by inspect.

Nothing here depends on when or where a conversion ran, so that an interrupted run and an undisturbed one write the
same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.precision import Precision
from pipeline.spec import Budgets, ExpertStatistics, VariantSpec

FACTS_FILE = "bitmill.json"

UNQUANTIZED_BITS = 16
"""What facts state as the bits of a linear that was left unquantized."""

OVERLAP_TOKENS = 32
"""Tokens in a row that held-out and calibration text share only when one was copied from the other."""


class Facts(BaseModel):
    """Base of every fact: frozen and closed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourcePlace(StrEnum):
    """Where a source is."""

    FOLDER = "folder"
    HUB = "hub"
    BUCKET = "bucket"


class SourceFacts(Facts):
    """The model that was converted."""

    name: str
    """`org/name` on a hub, `s3://bucket/prefix`, or the name of a local folder."""
    is_local: bool
    """Whether the source was a folder on disk."""
    commit: str
    """Hub commit (40 hex digits), for a folder the fingerprint of its files' digests, for a bucket that of its listing:
    names, sizes and ETags."""
    license: str | None
    """Licence identifier as its own card states it."""
    base_models: tuple[str, ...] = ()
    """What the own card of a source that is not on a hub says that it was made from: `org/name` on a hub."""
    architecture: str
    """Class named in config.json, for example `LlamaForCausalLM`."""
    num_parameters: int
    """Stored parameters (tied ones once)."""
    size_bytes: int
    """Bytes of weights."""
    dtype: str
    """Dtype that most parameters are stored in, for example `bfloat16`."""
    file_digests: dict[str, str]
    """SHA-256 of each weights file."""

    @property
    def place(self) -> SourcePlace:
        """Where it is; a hub has no name with a scheme."""
        if self.is_local:
            return SourcePlace.FOLDER
        return SourcePlace.BUCKET if "://" in self.name else SourcePlace.HUB


class CalibrationFacts(Facts):
    """The tokens that statistics were collected on."""

    text: str
    """`builtin`, the file's name, or the dataset file on the hub with its commit."""
    samples: int
    length: int
    seed: int
    slice_sequences: int
    """Sequences in a token slice, the unit of summation."""
    tokens_digest: str
    """SHA-256 of the token ids (int32, little-endian, row after row)."""
    shrinkage: float | Literal["auto"] = 0.0
    """Share of the correlations between inputs that was taken off, `auto` for what was found for each; releases from
    before there was a choice had none taken off."""
    precision: Precision = Precision.FLOAT32
    """Of matrix products in decoder blocks while these and the held-out tokens passed; releases from before there was
    a choice do not say it."""
    experts: ExpertStatistics | None = None
    """Which tokens the statistics of experts are of; None for a model without experts."""
    expert_shrinkage: float | None = None
    """With `shrinkage`, the weight of all tokens, that of an expert's own being 1."""
    min_expert_tokens: int | None = None
    """Tokens below which an expert counts as degraded; None where the statistics are of all tokens."""


class ModuleFacts(Facts):
    """One linear of the model."""

    name: str
    """Its name in the checkpoint, without `.weight`."""
    block: int
    """Index of its decoder block."""
    out_features: int
    in_features: int
    bits: int
    """Width of its codes; 16 stands for left unquantized, whatever dtype the source stores it in."""
    group_size: int
    """Group size used; 0 when it was left unquantized."""
    note: str
    """Why it differs from the variant's scheme; empty when it does not."""
    loss: float
    """Mean squared output error summed over outputs, per token."""
    relative_error: float
    """sqrt of tr(dW H dW^T) / tr(W H W^T)."""
    weight_error: float
    """Frobenius norm of the weight's error over the weight's."""
    damping: float
    """Damping fraction used by the factorization; 0 where none was made."""
    shrinkage: float = 0.0
    """Share of the correlations between its inputs that was taken off its statistics."""
    awq_exponent: float | None
    """Exponent of the activation-aware scaling; None where none was made."""
    degradations: tuple[str, ...]
    """What the solver did otherwise than asked."""
    expert_tokens: int | None = None
    """For a linear of an expert, the calibration tokens that the router sent there; None for others, and for what was
    left unquantized."""
    refinement_rounds: int = 0
    """Rounds of refinement that lowered the loss of some of its rows."""
    clip: float | None = None
    """Mean over groups of the scale over the one that clips nothing; None for what was left unquantized."""
    tokens: int | None = None
    """Calibration tokens that its statistics are sums over; None for what was left unquantized."""
    dead_inputs: int | None = None
    """Input channels that were zero on all of these tokens; None for what was left unquantized."""
    predicted_kl: float | None = None
    """With mixed precision, what its error alone adds to the divergence, as gradients predict it; None otherwise."""


def weights_by_width(modules: Iterable[ModuleFacts]) -> dict[int, int]:
    """Return the number of quantized weights by the width of their codes, the smallest first."""
    found: Counter[int] = Counter()
    for module in modules:
        if module.bits < UNQUANTIZED_BITS:
            found[module.bits] += module.out_features * module.in_features
    return dict(sorted(found.items()))


class Check(Facts):
    """One gate's answer."""

    name: str
    """For example `accounting`, `round_trip`, `scales`, `relative_error`, `divergence`, `generation`, `engine`."""
    passed: bool
    detail: str
    """What was compared with what, or which module or prompt failed."""
    figures: dict[str, float] = {}
    engine: str = ""
    """The engine that was asked, in a check of the name `engine`."""


class Sample(Facts):
    """A smoke prompt and what the release made of it."""

    prompt: str
    expect: str
    """The regular expression that the continuation had to match; empty when any text would do."""
    continuation: str
    ids: tuple[int, ...]
    """The continuation as it was generated: token ids without an end token."""


class Verdict(Facts):
    """The answer of all gates for one variant."""

    checks: tuple[Check, ...]
    budgets: Budgets
    samples: tuple[Sample, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed; a Verdict without checks has not."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)


class Quality(Facts):
    """How close a variant is to its source on held-out text."""

    heldout_text: str
    heldout_samples: int
    heldout_length: int
    heldout_tokens: int
    """Tokens whose prediction was scored."""
    heldout_overlap: float
    """Share of the held-out tokens that lie in a run of 32 tokens that the calibration tokens hold too."""
    source_perplexity: float
    perplexity: float
    kl: float
    """Mean KL(source || variant), nats per token."""
    top1_agreement: float
    """Share of tokens whose most likely prediction is the source's."""


class SiblingFacts(Facts):
    """Another variant of the same conversion, for comparison on the card."""

    variant: str
    passed: bool
    """Whether its Verdict passed; it was not published otherwise."""
    size_bytes: int
    kl: float
    perplexity: float


class ReleaseFacts(Facts):
    """Everything that a release says about itself."""

    schema_version: int = 1
    release: str
    """`namespace/name` of the release."""
    variant: VariantSpec
    source: SourceFacts
    calibration: CalibrationFacts
    modules: tuple[ModuleFacts, ...]
    kept: dict[str, str]
    """Tensors copied unquantized, each with the reason (`embedding`, `norm`, `output head`, ...)."""
    dropped: dict[str, str]
    """Source tensors that are not in the release, each with the reason."""
    cautions: tuple[str, ...]
    """What weakens the result without being a fault: for example fewer calibration tokens than input channels."""
    quality: Quality
    verdict: Verdict
    generated_tokens: int
    """Tokens that each smoke prompt was continued by, at most."""
    size_bytes: int
    """Bytes of weights in the release."""
    siblings: tuple[SiblingFacts, ...]
    versions: dict[str, str]
    """Versions of what computed the bytes: bitmill, torch, transformers, compressed-tensors."""
    compute: str
    """Device kind and dtype of the arithmetic, for example `cpu float32`."""
    spec_fingerprint: str
    """Fingerprint of the source, the variant, and everything that the weights were computed from and by."""
    repacked_from: str = ""
    """`namespace/name@revision` of the release whose codes these are, in another format; empty for one that was solved
    for."""
