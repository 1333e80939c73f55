"""How UHR-BAT-Tiny was trained."""
