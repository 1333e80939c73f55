"""Region partitions (section 3.4, appendix C.2) that need more than the model: SAM masks, their cache, the ablation."""

import export  # noqa: F401  makes the root's files the package `uhr_bat`
