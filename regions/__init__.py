"""Region partitions (section 3.4, appendix C.2) that need more than the model: SAM masks and their cache."""
