"""What a trained model answers, and what of the evidence it still saw."""

import export  # noqa: F401 - registers the model code as the package uhr_bat
