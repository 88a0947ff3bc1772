"""Coefficients of mixtures: a mixture of models × an objective × an optimiser.

Learned soups, WiSE-FT, interpolation, BCWI and the search for a merge method's parameters are settings of it.
"""

from soups.coefficients.descent import State as State
from soups.coefficients.descent import descend as descend
from soups.coefficients.fitting import Fitted as Fitted
from soups.coefficients.fitting import fit as fit
from soups.coefficients.granularity import GRANULARITIES as GRANULARITIES
from soups.coefficients.links import LINKS as LINKS
from soups.coefficients.mixture import Mixture as Mixture
from soups.coefficients.objectives import LossGradient as LossGradient
from soups.coefficients.objectives import Objective as Objective
from soups.coefficients.objectives import TemperedCrossEntropy as TemperedCrossEntropy
from soups.coefficients.optimisers import CmaEs as CmaEs
from soups.coefficients.optimisers import Cobyla as Cobyla
from soups.coefficients.optimisers import Grid as Grid
from soups.coefficients.optimisers import Optimiser as Optimiser
from soups.coefficients.optimisers import Points as Points
from soups.coefficients.optimisers import Random as Random
from soups.coefficients.papers import adamerging as adamerging
from soups.coefficients.papers import dam as dam
from soups.coefficients.papers import evolve as evolve
from soups.coefficients.papers import lorahub as lorahub
from soups.coefficients.papers import symerge as symerge
from soups.coefficients.parameters import search_parameters as search_parameters
from soups.coefficients.search import Found as Found
from soups.coefficients.search import ScoredPoint as ScoredPoint
from soups.coefficients.search import search as search
from soups.coefficients.suite_objective import TASK_LOSSES as TASK_LOSSES
from soups.coefficients.suite_objective import Suite as Suite
from soups.coefficients.suite_objective import SuiteObjective as SuiteObjective
