"""The source's own tokenizer: text to token ids and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.strict_json import parse_json_object

END_CONFIGS = ("generation_config.json", "config.json")
"""Files that may name the tokens which end a generation; the first that is there counts."""


class TextTokenizer:
    """A tokenizer loaded from a model folder.

    Attributes:
        end_ids: Token ids that end a generation.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer in ``folder``.

        Raises:
            SourceError: when the folder has none that transformers can load without remote code, or its end tokens
                cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (ValueError, KeyError, AttributeError, ImportError, OSError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SourceError(
                f"the tokenizer of {folder.name} cannot be loaded: {reason}",
                code="source.tokenizer",
                hint="the source must hold tokenizer.json (or the files of a slow tokenizer) beside config.json",
            ) from error
        own = self._tokenizer.eos_token_id
        self.end_ids: frozenset[int] = _configured_ends(folder) | ({own} if own is not None else set())

    def encode(self, text: str, with_special: bool = False) -> list[int]:
        """Return the token ids of ``text``; ``with_special`` adds what the model expects at the start of a prompt."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=with_special, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _configured_ends(folder: Path) -> frozenset[int]:
    """Return the token ids that end a generation: those of generation_config.json, else of config.json, as
    transformers has it.

    Raises:
        SourceError: when the file is not what it should be.
    """
    path = next((folder / name for name in END_CONFIGS if (folder / name).is_file()), None)
    if path is None:
        return frozenset()
    try:
        value = parse_json_object(path.read_bytes()).get("eos_token_id")
    except (OSError, ValueError) as error:
        raise _bad_config(path, str(error)) from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(end) is int for end in ids):
        raise _bad_config(path, f"its eos_token_id is {value!r:.60}")
    return frozenset(ids)


def _bad_config(path: Path, reason: str) -> SourceError:
    return SourceError(
        f"{path.name} of {path.parent.name} cannot be read: {reason}",
        code="source.tokenizer",
        hint="fetch the source again, or repair the file; eos_token_id is a token id or a list of them",
    )
