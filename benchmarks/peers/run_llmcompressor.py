"""Quantize with llm-compressor: ``run_llmcompressor.py JOB.json``, by the Python of its own environment.

Everything that the job does not name stays as the tool has it by default.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if not torch.accelerator.is_available():
        # Its AWQ pins memory for copies to a GPU whether there is one or not, and torch refuses that without one.
        torch.Tensor.pin_memory = lambda self: self
    torch.set_num_threads(job["threads"])
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["symmetric"],
        "strategy": "group",
        "group_size": job["group_size"],
    }
    grid = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**grid)] if job["method"] == "gptq" else [AWQModifier(), QuantizationModifier(**grid)]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    sequences = job["calibration"]
    texts = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    oneshot(
        model=model,
        dataset=texts,
        recipe=recipe,
        num_calibration_samples=len(sequences),
        max_seq_length=len(sequences[0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main()
