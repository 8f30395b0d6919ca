"""Quantize with AutoRound: ``run_autoround.py JOB.json``, by the Python of its own environment.

Everything that the job does not name stays as the tool has it by default.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
"""Sequences of one batch: the tool's default."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    tokens = torch.tensor(job["calibration"])
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.split(tokens, BATCH)]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        dataset=batches,
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        device_map="cpu",
        **({"iters": job["iterations"]} if job["iterations"] else {}),
    )
    out = Path(job["out"])
    rounding.quantize_and_save(str(out), format="auto_gptq" if job["symmetric"] else "auto_awq")
    # The tool makes a folder of its own below the one it is given.
    for folder in [folder for folder in out.iterdir() if folder.is_dir()]:
        shutil.copytree(folder, out, dirs_exist_ok=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
