"""Load a release in transformers as any user would, continue prompts greedily, and save the logits of every step.

Run by the engine environment's own Python: ``run_transformers.py MODEL_FOLDER JOB.json OUT_FOLDER``. The job holds
``prompts`` (token ids) and ``max_tokens``. Writes ``result.json`` and ``logits.safetensors`` (one float32 tensor
[length, vocabulary] for each prompt with its continuation).
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig


def main() -> None:
    """Do the job that the arguments name."""
    folder, job_file, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    job = json.loads(job_file.read_text())
    net: Any = AutoModelForCausalLM.from_pretrained(folder)
    net.eval()
    settings = net.generation_config
    # What a call leaves open, generate() takes from the release: a repetition penalty, say. Only its ends are wanted.
    net.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=job["max_tokens"],
        eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
    )
    sequences, logits, seconds, generated = [], {}, 0.0, 0
    for number, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt], device=net.device)
        start = time.perf_counter()
        with torch.no_grad():
            sequence = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
            seconds += time.perf_counter() - start
            logits[str(number)] = net(input_ids=sequence[None]).logits[0].float().cpu().contiguous()
        generated += len(sequence) - len(prompt)
        sequences.append(sequence.tolist())
    save_file(logits, out / "logits.safetensors")
    versions = {name: version(name) for name in ("transformers", "torch", "gptqmodel", "compressed-tensors")}
    result = {
        "versions": versions,
        "sequences": sequences,
        "tokens_per_s": generated / seconds,
        "dtype": str(net.dtype),
    }
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
