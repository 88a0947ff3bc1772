"""Papers as settings of a mixture, an objective and an optimiser: one small file each."""

from soups.coefficients.papers.adamerging import adamerging as adamerging
from soups.coefficients.papers.dam import dam as dam
from soups.coefficients.papers.evolve import evolve as evolve
from soups.coefficients.papers.lorahub import lorahub as lorahub
from soups.coefficients.papers.symerge import symerge as symerge
