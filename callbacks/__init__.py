"""Lightning adapters of the averages in `soups.averaging`: `from soups.callbacks import EMA, SWA, LAWA, Mixout`.

The package is `soups.callbacks`; in the repository `soups/callbacks` is a link to this folder. The folder's own name is
common, and a project may have a `callbacks` of its own. Where the repository's root is on the path (a checkout, an
editable install), `import callbacks` gives the same classes, and modules are looked up in the project's folders only.
"""

if __name__ == "callbacks":
    from pkgutil import extend_path

    __path__ = [folder for folder in extend_path([], __name__) if folder not in __path__]

    from soups.callbacks import EMA as EMA
    from soups.callbacks import LAWA as LAWA
    from soups.callbacks import SWA as SWA
    from soups.callbacks import Averages as Averages
    from soups.callbacks import Averaging as Averaging
    from soups.callbacks import Mixout as Mixout
    from soups.callbacks import PostHocEMA as PostHocEMA
    from soups.callbacks import Trajectory as Trajectory
else:
    from .averages import Averages as Averages
    from .base import Averaging as Averaging
    from .ema import EMA as EMA
    from .lawa import LAWA as LAWA
    from .mixout import Mixout as Mixout
    from .posthoc import PostHocEMA as PostHocEMA
    from .swa import SWA as SWA
    from .trajectory import Trajectory as Trajectory
