"""Which files of a source matter beside its weights, and what is no model at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from pipeline.errors import SourceNotFoundError, UnsafeWeightsError
from pipeline.weights import top_level_safetensors

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"

COMPANION_PATTERNS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "*preprocessor_config.json",
    "processor_config.json",
    "license*",
    "licence*",
    "notice*",
    "copying*",
    "use_policy*",
)
"""Files that travel into a release as they are; compared without case, ``*`` stays inside one folder."""

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
"""Files that run code when they are loaded."""

TRAINING_PATTERNS = ("training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state*")
"""Left by a trainer beside a model: no weights, whatever their ending."""


def is_companion(path: str) -> bool:
    """Return whether a file travels into releases as it is."""
    return _matches(path, COMPANION_PATTERNS)


def is_safe_path(path: str) -> bool:
    """Return whether a path stays inside the folder that it is written to, and a terminal shows it as it is."""
    parts = path.split("/")
    return all(part.isprintable() and "\\" not in part and part not in ("", ".", "..") for part in parts)


def pickled_weights(paths: Iterable[str]) -> list[str]:
    """Return the files that look like weights in a pickle, in any folder, sorted."""
    names = ((path, path.rpartition("/")[2]) for path in paths)
    return sorted(
        path for path, name in names if _matches(name, PICKLE_PATTERNS) and not _matches(name, TRAINING_PATTERNS)
    )


def require_model(paths: Collection[str], where: str) -> None:
    """Require a config and safetensors.

    Raises:
        UnsafeWeightsError: when the weights are only there as pickles.
        SourceNotFoundError: when there are no weights or no config.json.
    """
    has_safetensors = bool(top_level_safetensors(paths))
    pickles = pickled_weights(paths)
    if not has_safetensors and pickles:
        some = ", ".join(pickles[:3]) + (f" and {len(pickles) - 3} more" if len(pickles) > 3 else "")
        raise UnsafeWeightsError(
            f"{where} has its weights only as pickles ({some}); loading a pickle runs whatever code is in it",
            hint="choose a safetensors revision (hubs offer a converted one as a pull request: NAME@refs/pr/N), or "
            "re-save it in a sandbox with model.save_pretrained(folder, safe_serialization=True) and convert that",
            context={"files": pickles},
        )
    if CONFIG_FILE not in paths:
        raise SourceNotFoundError(
            f"{where} has no {CONFIG_FILE}, so it is no Hugging Face model",
            code="source.no_config",
            hint="give the folder or repository that holds config.json and *.safetensors side by side",
        )
    if not has_safetensors:
        others = (".gguf", ".onnx", ".h5", ".msgpack")
        kinds = sorted({path.rpartition(".")[2] for path in paths if path.endswith(others)})
        found = f"; it has {', '.join(kinds)}, which cannot be converted" if kinds else ""
        raise SourceNotFoundError(
            f"{where} has no *.safetensors file at its top level{found}",
            code="source.no_safetensors",
            hint="choose the original model's repository, or a revision with safetensors",
        )


def _matches(path: str, patterns: Iterable[str]) -> bool:
    lowered = path.lower()
    return any(pattern.count("/") == path.count("/") and fnmatchcase(lowered, pattern) for pattern in patterns)
