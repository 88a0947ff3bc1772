"""What a model predicts on a split, the numbers computed from it, and how far they can be trusted."""

from soups.evaluation.scores import Batch as Batch
from soups.evaluation.scores import Inputs as Inputs
from soups.evaluation.scores import Score as Score
from soups.evaluation.scores import ensemble as ensemble
from soups.evaluation.scores import forward as forward
from soups.evaluation.scores import ood_mean as ood_mean
from soups.evaluation.scores import predict as predict
from soups.evaluation.scores import score as score
