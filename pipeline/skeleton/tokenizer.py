"""The source's own tokenizer: text to token ids and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import SourceError


class TextTokenizer:
    """A tokenizer loaded from a model folder.

    Attributes:
        end_ids: Token ids that end a generation.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer in ``folder``.

        Raises:
            SourceError: when the folder has none that transformers can load without remote code.
        """
        from transformers import AutoTokenizer, GenerationConfig

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (ValueError, KeyError, AttributeError, ImportError, OSError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SourceError(
                f"the tokenizer of {folder.name} cannot be loaded: {reason}",
                code="source.tokenizer",
                hint="the source must hold tokenizer.json (or the files of a slow tokenizer) beside config.json",
            ) from error
        ends = {self._tokenizer.eos_token_id}
        if (folder / "generation_config.json").is_file():
            configured = GenerationConfig.from_pretrained(folder).eos_token_id
            ends |= set(configured) if isinstance(configured, list) else {configured}
        self.end_ids: frozenset[int] = frozenset(end for end in ends if end is not None)

    def encode(self, text: str, with_special: bool = False) -> list[int]:
        """Return the token ids of ``text``; ``with_special`` adds what the model expects at the start of a prompt."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=with_special, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
