"""Averages of weights over training, for loops of your own and for the callbacks in `soups.callbacks`.

    ema = EMA(half_life=500)
    for batch in loader:
        ...
        optimizer.step()
        ema.update(dict(model.named_parameters()))

Several averages are updated in one pass over the weights by `update([ema, lawa, …], weights)`.
"""

from soups.averaging.batchnorm import reestimate as reestimate
from soups.averaging.checkpoint import averages as averages
from soups.averaging.checkpoint import export as export
from soups.averaging.checkpoint import load_averaged as load_averaged
from soups.averaging.ema import EMA as EMA
from soups.averaging.ema import ema_update_ as ema_update_
from soups.averaging.lawa import LAWA as LAWA
from soups.averaging.lawa import latest_mean as latest_mean
from soups.averaging.mean import Mean as Mean
from soups.averaging.mean import MeanOptions as MeanOptions
from soups.averaging.mean import release as release
from soups.averaging.mean import update as update
from soups.averaging.mixout import mixout as mixout
from soups.averaging.posthoc import PostHoc as PostHoc
from soups.averaging.power import PowerEMA as PowerEMA
from soups.averaging.power import power_update_ as power_update_
from soups.averaging.profiles import Exponential as Exponential
from soups.averaging.profiles import Power as Power
from soups.averaging.profiles import Profile as Profile
from soups.averaging.profiles import Window as Window
from soups.averaging.schedulers import constant_swa as constant_swa
from soups.averaging.schedulers import cyclic_swa as cyclic_swa
from soups.averaging.snapshots import Snapshots as Snapshots
from soups.averaging.swa import SWA as SWA
from soups.averaging.swa import swa_update_ as swa_update_
from soups.averaging.swapping import averaged as averaged
