"""Packed linears read by gptqmodel's own code, in the engine's environment: every width, code by code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.formats.codec import codec_for
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.settings import engine_environment, load_settings
from pipeline.spec import FORMAT_BITS, Format
from pipeline.validate.engines.environment import ensure_environment
from tests.factories import UNSOLVED

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3000)]

READER = """
import json, sys
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file, save_file

weights = {}
for number, job in enumerate(json.load(open(sys.argv[1]))):
    is_v2 = job.pop("is_v2")
    linear = TorchLinear(desc_act=False, bias=False, **job)
    linear.load_state_dict(load_file(f"{sys.argv[2]}/{number}.safetensors"), strict=True)
    if not is_v2:
        convert_gptq_v1_to_v2_format_module(linear, job["bits"], torch.int32)
    linear.post_init()
    weights[str(number)] = linear.dequantize_weight().t().contiguous()
save_file(weights, f"{sys.argv[2]}/weights.safetensors")
"""


def make_linear(rows: int, columns: int, scheme: Scheme) -> QuantizedLinear:
    """Return a linear with every code, and scales of few bits, so that float16 holds each product exactly."""
    generator = torch.Generator().manual_seed(rows + columns)
    groups = rows, columns // scheme.group_size
    scale = torch.ldexp(torch.ones(groups), torch.randint(-6, 3, groups, generator=generator))
    zero = torch.full(groups, scheme.middle, dtype=torch.uint8)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.max_code + 1, groups, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, scheme.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    return QuantizedLinear(scheme, codes, scale, zero, UNSOLVED)


def test_gptqmodel_unpacks_every_width_to_the_same_weights(tmp_path: Path) -> None:
    shapes = [(32, 32), (96, 160), (224, 64)]
    grids = [(Format.GPTQ, True), (Format.GPTQ_V2, True), (Format.GPTQ_V2, False)]
    cases = [
        (format_, make_linear(rows, columns, Scheme(bits, 32, symmetric)))
        for format_, symmetric in grids
        for bits in FORMAT_BITS[format_]
        for rows, columns in shapes
    ]
    jobs = []
    for number, (format_, linear) in enumerate(cases):
        tensors = codec_for(format_).pack("x", linear, torch.float16)
        save_file({key.removeprefix("x."): value for key, value in tensors.items()}, tmp_path / f"{number}.safetensors")
        rows, columns = linear.codes_OI.shape
        grid = {"bits": linear.scheme.bits, "group_size": 32, "sym": linear.scheme.symmetric}
        is_v2 = format_ is Format.GPTQ_V2
        jobs.append({**grid, "in_features": columns, "out_features": rows, "is_v2": is_v2})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    python = ensure_environment("transformers", load_settings().cache_dir, print) / "bin" / "python"
    (tmp_path / "hub").mkdir()
    command = [str(python), "-c", READER, str(tmp_path / "jobs.json"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=engine_environment(tmp_path / "hub"), timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights = load_file(tmp_path / "weights.safetensors")
    for number, (_, linear) in enumerate(cases):
        assert torch.equal(weights[str(number)].float(), linear.dequantize()), jobs[number]
