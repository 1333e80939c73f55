"""Training: the stages of UHR-BAT-Tiny."""
