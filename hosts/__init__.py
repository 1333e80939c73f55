"""Vision-language models of other families behind the same calls: a hard budget, levels and evidence (docs/any_vlm.md)."""
