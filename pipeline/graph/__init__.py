"""The job graph: what is done, in which order, on which worker, and how a killed job goes on.

Read first: ``convert.py`` (the whole way of one conversion), then ``stages.py`` (the functions that workers run),
``dag.py`` (order, resume) and ``cluster.py`` (Ray). The only package that imports ray.
"""
