"""One tensor under several names: renamed by a library, prefixed by a wrapper, tied to another tensor, or derived."""

from soups.stores.names.library import Architecture as Architecture
from soups.stores.names.library import architecture_of as architecture_of
from soups.stores.names.matching import NameMatcher as NameMatcher
from soups.stores.names.reconcile import Reconciled as Reconciled
from soups.stores.names.reconcile import mate as mate
from soups.stores.names.reconcile import reconcile as reconcile
from soups.stores.names.reconcile import tie_groups as tie_groups
from soups.stores.names.renames import Renames as Renames
from soups.stores.names.renames import parse_renames as parse_renames
