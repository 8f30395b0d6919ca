"""Where releases and stage outputs are kept: directories and S3 buckets.

Read `objects.py` first (what a store promises), then `release.py` (how a release becomes visible) and `work.py`
(the outputs of a job's stages). This package is the only one that loads boto3, and only for ``s3://`` targets.
"""
