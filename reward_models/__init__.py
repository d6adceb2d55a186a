"""Concrete rewards for :mod:`lmppo`, and :func:`load`, which turns a command-line name into a reward function.

lexicon                      VADER's compound sentiment of the completion
classifier:<path or id>      log-odds of a sequence classifier, of its last label unless told; the shipped one is
                             classifier:tiny-reviews-sentiment; options follow a question mark:
                             classifier:<path or id>?output=probability&label=NEGATIVE&append_eos=true
toy:<name>=<number>          a reward with a known optimum: toy:target_token=13
package.module:function      any reward function that can be imported
path/to/file.py:function     any reward function in a file
"""

from reward_models.loading import load

__all__ = ["load"]
