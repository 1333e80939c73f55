"""Pictures of what the model looked at and what it kept: pages of panels, and the drawing on one image."""

from .pages import attention_picture, budgets_picture, kept_picture, objects_picture, regions_picture, tsne_picture

__all__ = ["attention_picture", "budgets_picture", "kept_picture", "objects_picture", "regions_picture", "tsne_picture"]
