"""Made-up satellite scenes whose content is known, and questions about them."""
