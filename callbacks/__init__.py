"""Lightning adapters of the averages in `soups.averaging`. Import them from `soups.callbacks`."""

from .averages import Averages as Averages
from .base import Averaging as Averaging
from .ema import EMA as EMA
from .lawa import LAWA as LAWA
from .mixout import Mixout as Mixout
from .posthoc import PostHocEMA as PostHocEMA
from .swa import SWA as SWA
from .trajectory import Trajectory as Trajectory
