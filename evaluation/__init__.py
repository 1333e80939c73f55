"""What a trained model answers, what of the evidence it still saw, and what partitions into regions do."""
