"""Evaluation: what a video shows, measured from its pixels, over time and over cache policies.

`run.py` is the command, `policies.py` what is compared, and `runs.py` makes one video and measures it. What is measured
is in `metrics.py`, from `views.py`, `objects.py`, `landscapes.py` and `over_time.py`. `summary.py` and `plots.py` say
what the results say together.
"""
