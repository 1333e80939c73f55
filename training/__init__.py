"""Training: fine-tuning on one's own data (`sft.py`), and the stages of UHR-BAT-Tiny (`tiny/`)."""
