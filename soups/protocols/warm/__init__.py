"""WARM: weight averaged reward models (arXiv:2401.12187).

`average` works on reward models that exist already; `+protocol=warm` trains them and judges their average.
"""

from soups.protocols.warm.average import average as average
