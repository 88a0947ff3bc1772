"""What a model predicts on a split, the numbers computed from it, and how far they can be trusted."""

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
