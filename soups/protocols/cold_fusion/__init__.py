"""ColD Fusion (arXiv:2212.01378): many contributors, one model in a repository, no server.

A contributor pulls the base, fine-tunes it on a task of its own, and pushes the weights (not the data, not the head). The
repository screens what was pushed and fuses it into the next base.
"""

from soups.protocols.cold_fusion.records import Contribution as Contribution
from soups.protocols.cold_fusion.records import Policy as Policy
from soups.protocols.cold_fusion.records import Round as Round
from soups.protocols.cold_fusion.records import Verdict as Verdict
from soups.protocols.cold_fusion.replay import Replayed as Replayed
from soups.protocols.cold_fusion.replay import replay as replay
from soups.protocols.cold_fusion.repository import Base as Base
from soups.protocols.cold_fusion.repository import Repository as Repository
