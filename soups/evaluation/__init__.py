"""What a model predicts on a split, the numbers computed from it, and how far they can be trusted."""

from soups.evaluation.diversity import Decomposition as Decomposition
from soups.evaluation.diversity import Diversity as Diversity
from soups.evaluation.diversity import agreement as agreement
from soups.evaluation.diversity import decompose as decompose
from soups.evaluation.diversity import distances as distances
from soups.evaluation.diversity import diversity as diversity
from soups.evaluation.flips import negative_flip_rate as negative_flip_rate
from soups.evaluation.gradients import HeldoutGradient as HeldoutGradient
from soups.evaluation.gradients import diagonal_fisher as diagonal_fisher
from soups.evaluation.rewards import best_of_n as best_of_n
from soups.evaluation.rewards import best_of_n_kl as best_of_n_kl
from soups.evaluation.rewards import pair_accuracy as pair_accuracy
from soups.evaluation.scores import Batch as Batch
from soups.evaluation.scores import Inputs as Inputs
from soups.evaluation.scores import Score as Score
from soups.evaluation.scores import candidates_of as candidates_of
from soups.evaluation.scores import ensemble as ensemble
from soups.evaluation.scores import forward as forward
from soups.evaluation.scores import ood_mean as ood_mean
from soups.evaluation.scores import predict as predict
from soups.evaluation.scores import score as score
