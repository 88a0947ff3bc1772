"""Protocols: many training runs by plan, and what their weights are averaged into."""

from soups.protocols.plan import Node as Node
from soups.protocols.plan import Operation as Operation
from soups.protocols.plan import Output as Output
from soups.protocols.plan import Plan as Plan
from soups.protocols.plan import Work as Work
from soups.protocols.plan import execute as execute
from soups.protocols.plan import in_sequence as in_sequence
from soups.protocols.plan import perform as perform
