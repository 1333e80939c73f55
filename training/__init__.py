"""Made-up scenes, and how UHR-BAT-Tiny was trained on them."""
