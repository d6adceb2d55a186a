"""``lmppo explain``: completions kept with a checkpoint, token by token, as a page, a table or JSON.

A critic gives each token a value, and so an advantage of its own: this is where one can look at them. The trainer writes
with :func:`save_rollouts`; ``saved.py`` holds what is kept, ``report.py`` makes it into numbers with meanings, and
``page.py`` draws them.
"""

from lmppo.explain.page import render_page
from lmppo.explain.report import explain, find_saved, make_report, print_report
from lmppo.explain.saved import SavedRollouts, SavedStream, load_saved_rollouts, save_rollouts, token_texts

__all__ = [
    "SavedRollouts",
    "SavedStream",
    "explain",
    "find_saved",
    "load_saved_rollouts",
    "make_report",
    "print_report",
    "render_page",
    "save_rollouts",
    "token_texts",
]
