"""What several tools share: loading a model, writing a prompt, writing files and tables."""
