"""The tiny task of tests/launch, for fits without Hydra."""

from tests.launch.conftest import digit_files as digit_files
from tests.launch.conftest import overrides as overrides
