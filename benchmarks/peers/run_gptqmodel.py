"""Quantize with GPTQModel: ``run_gptqmodel.py JOB.json``, by the Python of its own environment.

Everything that the job does not name stays as the tool has it by default.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # Read at import; with fewer than two the tool does not start.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, job["threads"]))
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    torch.set_num_threads(job["threads"])
    grid = {"bits": job["bits"], "group_size": job["group_size"], "sym": job["symmetric"]}
    # The automatic choice of kernels for AWQ needs a compiler or a GPU; results do not depend on it.
    config, backend = QuantizeConfig(**grid), BACKEND.AUTO
    if job["method"] == "awq":
        config, backend = QuantizeConfig(**grid, method=METHOD.AWQ, format=FORMAT.GEMM), BACKEND.TORCH_AWQ
    model = GPTQModel.load(job["model"], config, device="cpu", dtype=job["dtype"])
    sequences = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["calibration"]]
    model.quantize(sequences, batch_size=1, backend=backend)
    model.save(job["out"])


if __name__ == "__main__":
    main()
