"""How far a checkpoint's predictions are from its source's: the same forward pass and arithmetic for every tool.

The decoder's float32 weights go into the transformers model of the source's own config, as the source's do, so that
nothing of any tool takes part. For each position of a sequence but the last: the negative log likelihood of the true
token, KL(source || checkpoint), and whether both have the same most likely token.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers.decoder import Checkpoint, UnreadableCheckpointError, read_checkpoint
from benchmarks.peers.jobs import FOLDER, Tokens
from pipeline.fingerprint import digest_file, fingerprint

MAX_NLL = 700.0
"""exp of more is too large for a float."""


@dataclass(frozen=True)
class Score:
    """Means over the predictions of one text.

    Attributes:
        num_tokens: Predictions.
        source_perplexity: exp of the source's mean negative log likelihood.
        perplexity: The same of the checkpoint.
        kl: Mean KL(source || checkpoint), nats.
        agreement: Share of predictions with the same most likely token.
    """

    num_tokens: int
    source_perplexity: float
    perplexity: float
    kl: float
    agreement: float


def score_key(checkpoint: str, model: str, text: Tokens) -> str:
    """Return the fingerprint of all that a score follows from.

    Args:
        checkpoint: Digest of the checkpoint's weights.
        model: Digest of the source's.
        text: What is predicted.
    """
    code = [digest_file(FOLDER / name) for name in ("decoder.py", "scoring.py")]
    return fingerprint([checkpoint, model, text.digest, code])


class Scorer:
    """A source model, with which checkpoints are compared.

    Its logits (float32) are computed once for each text and lie on disk meanwhile: 4 bytes for each prediction and
    token of the vocabulary, 1.6 GB for 16 x 512 predictions of 49,152.
    """

    def __init__(self, source: Path, scratch: Path) -> None:
        """Prepare to score.

        Args:
            source: The source's folder.
            scratch: Folder for its logits.
        """
        self._source, self._scratch = source, scratch
        self._net: nn.Module | None = None

    def score(self, checkpoint: Path, texts: Sequence[Tokens]) -> list[dict[str, Any]]:
        """Return the score on each text, with the checkpoint's size and format.

        Raises:
            UnreadableCheckpointError: when the checkpoint cannot be read, or is not of this source.
        """
        read = read_checkpoint(checkpoint)
        net = load_dense(read, self._source)
        facts = {"weight_bytes": read.weight_bytes, "format": read.label, "linears": len(read.linears)}
        return [asdict(self._compare(net, text)) | facts for text in texts]

    def _compare(self, net: nn.Module, text: Tokens) -> Score:
        sums, num_tokens = torch.zeros(4, dtype=torch.float64), 0
        for number, sequence in enumerate(text.sequences):
            sums += compare_logits(self._logits(text, number), predict(net, sequence), torch.tensor(sequence[1:]))
            num_tokens += len(sequence) - 1
        source_nll, nll, kl, agreeing = (sums / num_tokens).tolist()
        return Score(num_tokens, _perplexity(source_nll), _perplexity(nll), kl, agreeing)

    def _logits(self, text: Tokens, number: int) -> Tensor:
        """Return the source's logits of one sequence."""
        file = self._scratch / f"{text.digest}-{number}.npy"
        if not file.is_file():
            self._net = self._net or load_dense(read_checkpoint(self._source), self._source)
            np.save(file, predict(self._net, text.sequences[number]).numpy())
        return torch.from_numpy(np.load(file))


def load_dense(checkpoint: Checkpoint, source: Path) -> nn.Module:
    """Return the model of the source's config with the weights of a checkpoint in float32.

    It goes through a dense checkpoint on disk, which transformers loads as it would any other: names that it maps, and
    tied weights, are its own matter.

    Raises:
        UnreadableCheckpointError: when a weight is missing or there is one too many.
    """
    with tempfile.TemporaryDirectory(prefix="bitmill-dense-") as name:
        folder = Path(name)
        dense = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
        save_file(dense, folder / "model.safetensors", {"format": "pt"})
        shutil.copyfile(source / "config.json", folder / "config.json")
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    net, found = loaded
    wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
    if wrong:
        raise UnreadableCheckpointError(f"the source's model does not take these weights: {json.dumps(wrong)[:400]}")
    net.eval()
    return cast(nn.Module, net)


@torch.no_grad()
def predict(net: nn.Module, sequence: Sequence[int]) -> Tensor:
    """Return logits float32 [L - 1, V] for every token of a sequence but the first."""
    logits: Tensor = net(input_ids=torch.tensor([sequence])).logits
    return logits[0, :-1].float()


def compare_logits(source_LV: Tensor, checkpoint_LV: Tensor, targets_L: Tensor) -> Tensor:
    """Return sums over positions, float64 [4]: both negative log likelihoods, KL(source || checkpoint), agreements.

    Args:
        source_LV: Logits of the source.
        checkpoint_LV: Logits of the checkpoint.
        targets_L: The tokens that follow, int64.
    """
    source_log, log = source_LV.log_softmax(-1), checkpoint_LV.log_softmax(-1)
    kl_L = (source_log.exp() * (source_log - log)).sum(-1)
    source_nll_L, nll_L = (-rows.gather(1, targets_L[:, None])[:, 0] for rows in (source_log, log))
    same_L = source_LV.argmax(-1) == checkpoint_LV.argmax(-1)
    return torch.stack([rows.double().sum() for rows in (source_nll_L, nll_L, kl_L, same_L)])


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < MAX_NLL else math.inf
