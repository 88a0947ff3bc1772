"""From one typed description of a fit (`FitSpec`) to a trained ingredient, with Lightning and without Hydra.

`spec` describes what decides the weights, `configuration` the whole of what a command can set, `schema` what both are made
of. See `soups.fitting.spec` for the description's interface.
"""

from soups.fitting.configuration import Configuration as Configuration
from soups.fitting.configuration import Layout as Layout
from soups.fitting.configuration import read_configuration as read_configuration
from soups.fitting.spec import FitSpec as FitSpec
from soups.fitting.spec import ProbeSpec as ProbeSpec
from soups.fitting.spec import fingerprint as fingerprint
