"""The labeled movie reviews, by their old name: see :mod:`reward_models.sentiment.reviews`."""

from reward_models.sentiment.reviews import load_reviews

__all__ = ["load_reviews"]
